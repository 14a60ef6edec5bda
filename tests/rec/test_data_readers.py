"""Reading CSV and Parquet: strings stay what they are, and every bad input is one clear line."""

import csv
import datetime
from decimal import Decimal

import polars as pl
import pytest

from saml_rec.data import csv_files, readers
from saml_rec.data.cells import conform
from saml_rec.data.csv_format import BEGINNING_BYTES, CsvFormat, CsvOptions, Roles, csv_format
from saml_rec.data.readers import read_frame, read_table, require_csv_columns
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError

SCHEMA = Schema.from_dict(
    {
        "label": "y",
        "scenario": "country",
        "time": "ts",
        "features": {
            "item": {"kind": "sparse"},
            "tags": {"kind": "multi"},
            "price": {"kind": "dense"},
            "history": {"kind": "sequence", "item": "item"},
        },
    }
)
WEIGHTED = Schema.from_dict(
    {"label": "y", "scenario": "country", "weight": "w", "group": "user", "features": {"item": {"kind": "sparse"}}}
)
HEADER = "y,country,ts,item,tags,price,history\n"
GOOD = HEADER + "1,de,10,007,a|b,1.5,007|8\n0,fr,11,8,,,\n"


@pytest.fixture
def read(tmp_path):
    """Writes content to a file and reads it with the schema above."""

    def write_and_read(content, name="data.csv", schema=SCHEMA, **options):
        path = tmp_path / name
        if isinstance(content, pl.DataFrame):
            content.write_parquet(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_table(path, schema, **options)

    return write_and_read


def as_parquet(**columns):
    """Two good rows as Parquet would hold them, with some columns replaced."""
    good = {
        "y": [1, 0],
        "country": ["de", "fr"],
        "ts": [10, 11],
        "item": ["007", "8"],
        "tags": [["a", "b"], []],
        "price": [1.5, None],
        "history": [["007", "8"], None],
    }
    return pl.DataFrame(good | columns)


def test_cells_of_a_csv_file(read):
    frame = read(GOOD)
    assert frame.to_dicts() == [
        {"y": 1, "country": "de", "ts": 10, "item": "007", "tags": "a|b", "price": 1.5, "history": "007|8"},
        {"y": 0, "country": "fr", "ts": 11, "item": "8", "tags": None, "price": None, "history": None},
    ]
    assert frame.schema["y"] == pl.UInt8
    assert frame.schema["price"] == pl.Float64


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n\n",
        lambda text: text.removesuffix("\n"),
        lambda text: text.replace("007,a|b", '"007","a|b"'),
    ],
)
def test_ways_to_write_the_same_csv(read, change):
    assert read(change(GOOD)).equals(read(GOOD))


STRINGS = [
    "日本 語",
    "مرحبا",
    "😀👩‍👩‍👧",
    "a, b",
    "two\nlines",
    'a "quote"',
    " spaced ",
    "NaN",
    "NA",
    "null",
    "1e5",
    "+1",
    "-0",
]


def test_strings_of_any_language_survive_csv_and_parquet(read):
    frame = pl.DataFrame(
        {
            "y": [index % 2 for index in range(len(STRINGS))],
            "country": STRINGS,
            "ts": range(len(STRINGS)),
            "item": STRINGS,
            "tags": [f"{text}|{text}" for text in STRINGS],
            "price": 1.0,
            "history": STRINGS,
        }
    )
    from_csv, from_parquet = read(frame.write_csv()), read(frame)
    for column in ("country", "item", "history"):
        assert from_csv[column].to_list() == STRINGS
    assert from_csv.equals(from_parquet)


def test_the_content_decides_not_the_name(read):
    assert read(as_parquet(), name="data.csv")["item"].to_list() == ["007", "8"]
    assert read(GOOD, name="data.parquet")["item"].to_list() == ["007", "8"]


def test_scoring_needs_neither_label_nor_time_and_keeps_the_rest(read):
    frame = read("country,item,tags,price,history,y,note\nde,1,,2,,?,hello\n", need_label=False)
    assert frame.to_dicts() == [
        {"country": "de", "item": "1", "tags": None, "price": 2.0, "history": None, "y": "?", "note": "hello"}
    ]


def test_the_time_is_needed_for_splitting_only(read):
    content = "note,y,country,item,tags,price,history\nhello,1,de,1,,2,\n"
    assert "note" not in read(content, need_split=False).columns
    with pytest.raises(InputError, match="no column 'ts'"):
        read(content)


@pytest.mark.parametrize(
    "values",
    [
        ["0", "1"],
        ["0.0", "1.0"],
        ["False", "TRUE"],
        [" 0", "1 "],
        ["no", "Yes"],
        ["N", "y"],
        ["f", "T"],
        ["-1", "1"],
        ["-1.0", "+1"],
        ["0e0", "1e0"],
        ["0.00", "01"],
    ],
)
def test_labels_in_csv(read, values):
    content = HEADER + "".join(f"{value},de,1,i,,1,\n" for value in values)
    assert read(content)["y"].to_list() == [0, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "-1", "1", "0"], "column 'y', row 4: expected a label of -1 or 1, as in the rows before, got '0'"),
        (["0", "1", "1", "-1.0"], "column 'y', row 4: expected a label of 0 or 1, as in the rows before, got '-1.0'"),
        (["1", "null"], "column 'y', row 2: expected a label of 0 or 1, got 'null'"),
        (["1", "maybe"], "column 'y', row 2: expected a label of 0 or 1, got 'maybe'"),
    ],
)
def test_labels_that_contradict_each_other(read, chunks, values, message):
    with pytest.raises(InputError, match=message):
        read(HEADER + "".join(f"{value},de,1,i,,1,\n" for value in values))


@pytest.mark.parametrize(
    "values",
    [[False, True], [0.0, 1.0], [-1, 1], pl.Series(["0", "1"], dtype=pl.Categorical), [Decimal("0"), Decimal("1.0")]],
)
def test_labels_in_parquet(read, values):
    assert read(as_parquet(y=values))["y"].to_list() == [0, 1]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([7, None], ["7", None]),
        ([7.0, float("nan")], ["7", None]),
        (pl.Series([7.0, None], dtype=pl.Float32), ["7", None]),
        (pl.Series([2**24 - 1, 0.5], dtype=pl.Float32), ["16777215", "0.5"]),
        ([7.5, 8.0], ["7.5", "8"]),
        ([2.0**53 - 1, -0.0], ["9007199254740991", "0"]),
        ([2**63 - 1, -(2**63)], ["9223372036854775807", "-9223372036854775808"]),
        ([Decimal("12.00"), Decimal("12.50")], ["12", "12.5"]),
        ([Decimal("1200"), Decimal("-10")], ["1200", "-10"]),
        ([True, None], ["true", None]),
        (["True", "FALSE"], ["true", "false"]),
        (["TRUE", "False"], ["true", "false"]),
        (["12.0", "tRUE"], ["12.0", "tRUE"]),
        (pl.Series(["a", ""], dtype=pl.Categorical), ["a", None]),
        (pl.Series(["a", "b"], dtype=pl.Enum(["b", "a"])), ["a", "b"]),
        ([datetime.date(2024, 1, 2), None], ["2024-01-02", None]),
        ([b"abc", b""], ["abc", None]),
        ([None, None], [None, None]),
    ],
)
def test_sparse_columns_in_parquet(read, column, expected):
    assert read(as_parquet(item=column))["item"].to_list() == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([[1, 2], [3]], [["1", "2"], ["3"]]),
        ([[1.0, None], []], [["1", None], []]),
        ([[1.0], None], [["1"], None]),
        ([[5000], [2**53]], [["5000"], ["9007199254740992"]]),
        ([[5000.0], [1.5]], [["5000"], ["1.5"]]),
        (pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)), [["1", "2"], ["3", "4"]]),
        (pl.Series([["a"], None], dtype=pl.List(pl.Categorical)), [["a"], None]),
        ([[], []], [[], []]),
        ([12, None], ["12", None]),
        (["1|2", ""], ["1|2", None]),
        ([None, None], [None, None]),
        ([[True], [False, None]], [["true"], ["false", None]]),
        ([["True"], ["x"]], [["true"], ["x"]]),
        (["True|x", "y"], [["true", "x"], ["y"]]),
        ([[Decimal("12.0")], [Decimal("1.5")]], [["12"], ["1.5"]]),
        (["['a', 'b']", "[1,2]"], [["a", "b"], ["1", "2"]]),
        (['["a|b", "c, d"]', " [ ] "], [["a|b", "c, d"], []]),
        (["[1.0, 2.50, 007, 1e3]", "[-3]"], [["1", "2.5", "007", "1000"], ["-3"]]),
        (["[5000.0, .5, -1.E4]", "['1.0', '1e3']"], [["5000", "0.5", "-10000"], ["1.0", "1e3"]]),
        (["[True, false, None, null, nan, NaN]", ""], [["true", "false", None, None, None, None], None]),
        (["[1]", "True|x|"], [["1"], ["true", "x", ""]]),
        (["[a]|[b]", None], ["[a]|[b]", None]),
        ([r'["\u00e9\"", "a\\b"]', r"""['it\'s', "it's"]"""], [['é"', "a\\b"], ["it's", "it's"]]),
        (["['a',]", "b|c"], [["a"], ["b", "c"]]),
        (["[a]|[b]", "x"], ["[a]|[b]", "x"]),
        (["['']", "['é\n']"], [[None], ["é\n"]]),
        (["(1, 2.0)", "('a|b',)"], [["1", "2"], ["a|b"]]),
        ([" ( ) ", "(1)|x"], [[], ["(1)", "x"]]),
        (["(1,)|(2,)", "(a, b)"], ["(1,)|(2,)", "(a, b)"]),
        (["{}", '{"a": 1}'], ["{}", '{"a": 1}']),
    ],
)
def test_lists_in_parquet(read, column, expected):
    frame = read(as_parquet(history=column, tags=column))
    assert frame["history"].to_list() == expected
    assert frame["tags"].to_list() == expected


@pytest.mark.skipif(not hasattr(pl, "Float16"), reason="this polars has no floats of two bytes")
def test_floats_of_two_bytes(read):
    column = pl.Series([2**11 - 1, 0.5], dtype=pl.Float16)
    assert read(as_parquet(item=column))["item"].to_list() == ["2047", "0.5"]
    lists = pl.Series([[7, -1.5], [None]], dtype=pl.List(pl.Float16))
    assert read(as_parquet(tags=lists))["tags"].to_list() == [["7", "-1.5"], [None]]
    expected = r"row 2: expected an id below 2\^11, where Float16 still tells whole numbers apart, got 2048\.0"
    with pytest.raises(InputError, match=expected):
        read(as_parquet(item=pl.Series([1, 2**11], dtype=pl.Float16)))


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("{1, 2.0}", ["1", "2"]), (" {'a|b' , 'c',} ", ["a|b", "c"]), ("set()", []), ("{}|x", ["{}", "x"])],
)
def test_sets_are_bags_and_no_sequences(read, cell, expected):
    row = '0,de,10,7,"%s",,"%s"\n'
    tags = read(HEADER + row % (cell, "") + row % ("[3]", ""))["tags"].to_list()
    assert tags == [expected, ["3"]]
    if cell.startswith("{}"):
        assert read(HEADER + row % ("", cell))["history"].to_list() == [cell]
    else:
        with pytest.raises(InputError, match="column 'history', row 2: expected values in order, of which a set has"):
            read(HEADER + row % ("", "(1, 2)") + row % ("", cell))


@pytest.mark.parametrize("cell", ["[1 2]", "[a, b]", "['a' 'b']", "[[1], [2]]", "['a", "[1, 2", "['a'] ['b']"])
def test_brackets_that_are_no_list(read, cell):
    good = HEADER + "1,de,10,7,,,7\n"
    if cell.endswith("]"):
        with pytest.raises(
            InputError, match=r"column 'history', row 2: expected values separated by '\|', or a list of"
        ):
            read(good + f'0,de,10,7,,,"{cell}"\n')
    else:
        assert read(good + f'0,de,10,7,,,"{cell}"\n')["history"].to_list() == ["7", cell]


@pytest.mark.parametrize(("token", "shown"), [(r"'\x'", r'''"'\\x'"'''), (r'"\u12"', r"""'"\\u12"'""")])
def test_escapes_of_a_list_that_nobody_writes(read, token, shown):
    with pytest.raises(InputError) as caught:
        read(as_parquet(history=[f"[{token}, 'a']", "b"]))
    message = f"data.csv: column 'history': {shown} in a list is not text as Python or JSON write it"
    assert str(caught.value).endswith(message)


def test_lists_as_text_over_chunks(read, chunks):
    cells = ["", "", "", '"[1, 2]"', "3|4", '"[]"', ""]
    rows = "".join(f"1,de,{n},7,,,{cell}\n" for n, cell in enumerate(cells))
    assert read(HEADER + rows)["history"].to_list() == [None, None, None, ["1", "2"], ["3", "4"], [], None]


@pytest.mark.parametrize(
    "column",
    [
        ["1.5", " NaN "],
        ["1.5", "NULL"],
        ["1.5", "na"],
        ["1.5", "None"],
        ["1.5", r"\N"],
        [1.5, float("nan")],
        [Decimal("1.5"), None],
        ["1.50", " "],
    ],
)
def test_dense_columns(read, column):
    assert read(as_parquet(price=column))["price"].to_list() == [1.5, None]


UTC = datetime.UTC


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["3", " -2"], [3, -2]),
        (["9223372036854775807", "1"], [9223372036854775807, 1]),
        (["1e20", "1"], [1e20, 1.0]),
        (["1704067200123456789", "1704067200123456788"], [1704067200123456789, 1704067200123456788]),
        (["1.5", "2"], [1.5, 2.0]),
        (["1", "2.5", "1e3"], [1.0, 2.5, 1000.0]),
        (
            ["2024-01-02", "2024-01-02T03:04", "2024-01-02 03:04:05.25"],
            [
                datetime.datetime(2024, 1, 2, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 3, 4, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 3, 4, 5, 250000, tzinfo=UTC),
            ],
        ),
        (
            ["2024-01-02T03:04Z", "2024-01-02T03:04:05+02:00", "2024-01-02T03:04:05-0130", "2024-01-02 03:04+01:00"],
            [
                datetime.datetime(2024, 1, 2, 3, 4, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 1, 4, 5, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 4, 34, 5, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 2, 4, tzinfo=UTC),
            ],
        ),
        (
            ["2024/01/02", "2024/01/02 03:04 UTC", "2024-01-02T03:04:05+02", "2024-01-02Z", "2024-01-02 03:04:05.5-01"],
            [
                datetime.datetime(2024, 1, 2, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 3, 4, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 1, 4, 5, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, tzinfo=UTC),
                datetime.datetime(2024, 1, 2, 4, 4, 5, 500000, tzinfo=UTC),
            ],
        ),
    ],
)
def test_times_in_csv(read, texts, expected):
    content = HEADER + "".join(f"{index % 2},de,{text},i,,1,\n" for index, text in enumerate(texts))
    assert read(content)["ts"].to_list() == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1.5, 2.5], [1.5, 2.5]),
        (pl.Series([1, 2**63 - 1], dtype=pl.UInt64), [1, 2**63 - 1]),
        ([Decimal(2**60 + 1), Decimal(1)], [2**60 + 1, 1]),
        ([datetime.date(2024, 1, 2)] * 2, [datetime.datetime(2024, 1, 2, tzinfo=UTC)] * 2),
        ([datetime.datetime(2024, 1, 2, 3)] * 2, [datetime.datetime(2024, 1, 2, 3, tzinfo=UTC)] * 2),
        (
            pl.Series([datetime.datetime(2024, 1, 2, 3)] * 2).dt.replace_time_zone("Asia/Tokyo"),
            [datetime.datetime(2024, 1, 1, 18, tzinfo=UTC)] * 2,
        ),
    ],
)
def test_times_in_parquet(read, column, expected):
    assert read(as_parquet(ts=column))["ts"].to_list() == expected


BAD_CELLS = [
    # column, value in row 2, what the message says
    ("y", "2", r"column 'y', row 2: expected a label of 0 or 1, got '2'"),
    ("y", "", r"column 'y', row 2: expected a label of 0 or 1, got an empty cell"),
    ("y", "0.5", r"column 'y', row 2: .* got '0.5'"),
    ("country", "", r"column 'country', row 2: expected the name of a scenario, got an empty cell"),
    ("country", '"  "', r"column 'country', row 2: expected the name of a scenario, got '  '"),
    ("price", "cheap", r"column 'price', row 2: expected a number, got 'cheap'"),
    ("price", "x" * 200_000, r"column 'price', row 2: expected a number, got 'x{20,40}\.\.\.x{20,40}'$"),
    ("price", "1,5", r"row 2 has 8 fields, the header has 7; quote a field that holds commas"),
    ("price", '"1,5"', r"column 'price', row 2: expected a number, got '1,5'"),
    ("price", "inf", r"column 'price', row 2: expected a finite number within the range of float32, got 'inf'"),
    ("price", "-Infinity", r"column 'price', row 2: expected a finite number"),
    ("price", "1e39", r"column 'price', row 2: expected a finite number within the range of float32, got '1e39'"),
    ("ts", "9223372036854775808", r"column 'ts', row 2: expected a whole number from -2\^63 to 2\^63 - 1, got '9223"),
    ("ts", "soon", r"column 'ts', row 2: expected a number, as in row 1, got 'soon'"),
    ("ts", "", r"column 'ts', row 2: expected a number, as in row 1, got an empty cell"),
    ("ts", "nan", r"column 'ts', row 2: expected a number or an ISO-8601 date or time, got 'nan'"),
    ("ts", "inf", r"column 'ts', row 2: expected a number or an ISO-8601 date or time, got 'inf'"),
    ("ts", "2024-01-01", r"column 'ts', row 2: expected a number, as in row 1, got '2024-01-01'"),
]


@pytest.mark.parametrize(("column", "value", "message"), BAD_CELLS)
def test_a_bad_cell_is_one_line_with_column_row_and_value(read, column, value, message):
    good = dict(zip(HEADER.strip().split(","), ["1", "de", "10", "i", "", "1", ""], strict=True))
    rows = [good, good | {column: value}, good]
    with pytest.raises(InputError, match=message) as caught:
        read(HEADER + "".join(",".join(row.values()) + "\n" for row in rows))
    assert "\n" not in str(caught.value)
    assert "data.csv" in str(caught.value)


@pytest.mark.parametrize("value", ["2024-02-30", "2024-1-5", "01/02/2024", "yesterday", "2024-01-01T25:00", ""])
def test_dates_that_are_none(read, value):
    content = HEADER + f"1,de,2024-01-01,i,,1,\n1,de,{value},i,,1,\n"
    with pytest.raises(InputError, match=r"column 'ts', row 2: expected a number or an ISO-8601 date or time"):
        read(content)


def test_a_row_is_counted_by_rows_not_lines(read):
    content = HEADER + '1,de,1,"two\nlines",,1,\n1,de,1,i,,x,\n'
    with pytest.raises(InputError, match=r"column 'price', row 2"):
        read(content)


NO_TABLES = [
    (b"", "is empty"),
    (b"\n\n  \n", "is empty"),
    (b"\xef\xbb\xbf", "is empty"),
    (b"\n" + GOOD.encode(), "begins with an empty line; expected the names of the columns"),
    (HEADER.encode(), "has a header but no rows"),
    (b"\x1f\x8b\x08\0", "cannot be read"),
    (b"PK\x03\x04abc", "is a zip archive or an Excel workbook"),
    (GOOD.encode("utf-16"), "is UTF-16 text"),
    (b"\x89PNG\r\n\x1a\n\0\0", "is a binary file"),
    (b" <!DOCTYPE html>\n<html></html>", "is an HTML or XML page"),
    (b"PAR1 and nothing else", "begins like Parquet but cannot be read"),
    (GOOD.encode().replace(b"de", b"\xe9"), r"is not UTF-8 text \(line 2\)"),
    (GOOD.replace(",item,", ",y,").encode(), "more than one column 'y'"),
    (GOOD.replace(",item,", ",itme,").encode(), "no column 'item'; did you mean 'itme'.*it has 'y', 'country', 'ts'"),
    (GOOD.encode() + b"1,de,12,i,a", r"row 3 has 5 fields, the header has 7$"),
    (GOOD.encode().replace(b"\n0", b"\n\n0"), r"row 2 has 0 fields, the header has 7$"),
    (GOOD.encode() + b'1,de,3,"open,,1,\n', r"row 3, column 'item': expected a quoted cell to end in a quote before"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), NO_TABLES)
def test_files_that_are_no_table(read, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read(content)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_cut_short(read, tmp_path):
    read(as_parquet(), name="whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    for size in range(4, len(content), 97):
        with pytest.raises(InputError, match="begins like Parquet but cannot be read") as caught:
            read(content[:size])
        assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows(read):
    with pytest.raises(InputError, match="has a header but no rows"):
        read(as_parquet().head(0))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"y": [1, 2]}, "column 'y', row 2: expected a label of 0 or 1, got 2"),
        ({"y": [1, None]}, "column 'y', row 2: .* got an empty cell"),
        ({"country": ["de", None]}, "column 'country', row 2: .* got an empty cell"),
        ({"item": [["a"], ["b"]]}, r"column 'item' holds List\(String\); expected one value in each row"),
        ({"item": [{"a": 1}, {"a": 2}]}, "column 'item' holds Struct"),
        ({"item": [b"\xff", b"a"]}, "column 'item' holds Binary that is not text"),
        ({"tags": [b"\xff", b"a"]}, "column 'tags' holds Binary that is not text"),
        ({"tags": [[b"a", b"\xff"], []]}, r"column 'tags' holds List\(Binary\) that is not text"),
        ({"price": [[1.0], [2.0]]}, "column 'price' holds List"),
        ({"item": [1.0, 2.0**53]}, r"column 'item', row 2: expected an id below 2\^53, .* got 9007199254740992.0"),
        ({"country": [1.0, float("inf")]}, r"column 'country', row 2: expected an id below 2\^53, .* got inf"),
        (
            {"item": pl.Series([1, 2**24], dtype=pl.Float32)},
            r"column 'item', row 2: expected an id below 2\^24, .* Float32",
        ),
        (
            {"tags": [[1.0], [2.0, 1e16]]},
            r"column 'tags', row 2: expected lists of which each value is an id below 2\^53",
        ),
        (
            {"tags": ["[1]", "[1, 1e16]"]},
            r"column 'tags', row 2: expected a list of which each value is an id below 2\^53",
        ),
        ({"ts": pl.Series([1, 2**63], dtype=pl.UInt64)}, r"column 'ts', row 2: expected a whole number from -2\^63"),
        ({"ts": [Decimal(1), Decimal(2**64)]}, r"column 'ts', row 2: expected a whole number from -2\^63"),
        ({"price": [datetime.date(2024, 1, 1)] * 2}, "column 'price' holds Date; expected a number"),
        ({"price": [1.0, float("inf")]}, "column 'price', row 2: expected a finite number .* got inf"),
        ({"tags": [[["a"]], [["b"]]]}, "column 'tags' holds .*; expected lists of single values"),
        ({"ts": [1.0, float("nan")]}, "column 'ts', row 2"),
        ({"ts": [1.0, float("inf")]}, "column 'ts', row 2"),
        ({"ts": [1, None]}, "column 'ts', row 2: .* got an empty cell"),
        ({"ts": [datetime.timedelta(1)] * 2}, "column 'ts' holds Duration"),
        ({"ts": [True, False]}, "column 'ts' holds Boolean"),
    ],
)
def test_bad_parquet_columns(read, columns, message):
    with pytest.raises(InputError, match=message):
        read(as_parquet(**columns))


def test_no_path(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "missing.csv", SCHEMA)
    with pytest.raises(InputError, match=r"this directory has no files that end in \.csv, \.parquet"):
        read_table(tmp_path, SCHEMA)


def test_a_long_cell_before_an_empty_one(read):
    history = "|".join(["item"] * 50_000)
    content = "y,country,ts,item,tags,history,price\n" + f"1,de,1,i,,{history},\n"
    assert read(content)["history"].to_list() == [history]


def test_a_name_with_pattern_characters_is_a_name(read):
    assert read(GOOD, name="data[1]*.csv").height == 2


SPLIT = Schema.from_dict({"label": "y", "scenario": "s", "split_column": "part", "features": {"s": {"kind": "sparse"}}})


def test_the_split_column_holds_three_names(read):
    parts = "1,a,train\n0,a,test\n1,a,Train\n1,a,val\n1,a,VALIDATION\n1,a, valid\n"
    expected = ["train", "test", "train", "valid", "valid", "valid"]
    assert read("y,s,part\n" + parts, schema=SPLIT)["part"].to_list() == expected
    with pytest.raises(InputError, match="column 'part', row 1: expected train, valid or test, got 'training'"):
        read("y,s,part\n1,a,training\n", schema=SPLIT)


def test_a_scenario_that_is_a_feature_may_not_be_empty(read):
    with pytest.raises(InputError, match="row 2: expected the name of a scenario"):
        read("y,s,part\n1,a,train\n0,,test\n", schema=SPLIT)


def test_conform_takes_what_it_returns():
    frame = conform(as_parquet(), SCHEMA)
    assert conform(frame, SCHEMA).equals(frame)
    with pytest.raises(InputError, match=r"^clicks: column 'y', row 1"):
        conform(as_parquet(y=[3, 0]), SCHEMA, source="clicks")


def test_the_frame_of_a_csv_file_is_its_text(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n5,""\r\n 5.0,\r\n')
    assert read_frame(path).equals(pl.DataFrame({"a": ["5", " 5.0"], "b": ["", None]}))


def test_the_frame_of_a_parquet_file_keeps_its_types(tmp_path):
    frame = as_parquet(item=[7, 8], more=[{"x": 1}, None], price=pl.Series([1, None], dtype=pl.Int16))
    frame.write_parquet(tmp_path / "data.parquet")
    read_back = read_frame(tmp_path / "data.parquet")
    assert read_back.schema == frame.schema
    assert read_back.equals(frame)


def test_what_csv_can_hold(tmp_path):
    path = tmp_path / "data"
    path.write_text(GOOD, encoding="utf-8")
    require_csv_columns(path)
    kinds = {"i": [1], "f": [0.5], "s": ["x"], "b": [True], "d": [datetime.date(2024, 1, 1)], "c": [Decimal("1.5")]}
    frame = pl.DataFrame(kinds | {"t": [datetime.datetime(2024, 1, 1)], "n": [None]})
    frame.write_parquet(path)
    require_csv_columns(path)
    frame.write_csv(tmp_path / "out.csv")


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([[1]]),
        pl.Series([[1]], dtype=pl.Array(pl.Int8, 1)),
        pl.Series([{"x": 1}]),
        pl.Series([b"x"]),
        pl.Series([datetime.timedelta(1)]),
    ],
    ids=lambda column: str(column.dtype),
)
def test_what_csv_cannot_hold(tmp_path, column):
    path = tmp_path / "data"
    frame = pl.DataFrame({"a": [1], "b": column})
    frame.write_parquet(path)
    with pytest.raises(InputError, match=r"^[^\n]*column 'b' holds [^\n]*, which CSV cannot hold; [^\n]*$"):
        require_csv_columns(path)
    with pytest.raises(pl.exceptions.PolarsError):
        frame.write_csv(tmp_path / "out.csv")


def test_columns_of_damaged_parquet(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(InputError, match="begins like Parquet but cannot be read"):
        require_csv_columns(path)


@pytest.fixture(params=[1, 2, 3, 5])
def chunks(request, monkeypatch):
    """Chunks of so many rows."""
    monkeypatch.setattr(readers, "CHUNK_ROWS", request.param)
    return request.param


MANY = "".join(f"{n % 2},de,{n},i{n},a|b,{n}.5,i{n}\n" for n in range(11))


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n\n\n\n\n"])
def test_rows_do_not_depend_on_chunks(read, chunks, end):
    frame = read(HEADER + MANY + end)
    assert frame["ts"].to_list() == list(range(11))
    assert frame["price"].to_list() == [n + 0.5 for n in range(11)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (MANY + "2,de,1,i,,,\n", r"column 'y', row 12: expected a label of 0 or 1, got '2'"),
        (MANY + "1,de,1,i,,x,\n" + MANY, r"column 'price', row 12: expected a number, got 'x'"),
        (MANY + "1,de,1,i\n" + MANY, r"row 12 has 4 fields, the header has 7$"),
        (MANY + "\n" + MANY, r"row 12 has 0 fields, the header has 7$"),
        (MANY + ",,,,,,\n", r"column 'country', row 12: expected the name of a scenario, got an empty cell"),
        (MANY + "1,de,1,i,,,,9\n", r"row 12 has 8 fields, the header has 7; quote a field that holds commas"),
    ],
)
def test_rows_are_counted_over_chunks(read, chunks, rows, message):
    with pytest.raises(InputError, match=message):
        read(HEADER + rows)


def test_times_over_chunks(read, chunks):
    rows = [MANY.splitlines()[n] for n in range(8)]
    assert read(HEADER + "\n".join(rows) + "\n1,de,8.5,i,,,\n")["ts"].to_list() == [*range(8), 8.5]
    with pytest.raises(InputError, match=r"column 'ts', row 9: expected a number, as in (row|the rows before)"):
        read(HEADER + "\n".join(rows) + "\n1,de,2024-01-01,i,,,\n")


def test_weights_are_numbers_and_groups_are_anything(read):
    frame = read("y,country,w,user,item\n1,de,0.5,007,a\n0,fr,0,7,b\n", schema=WEIGHTED)
    assert frame["w"].to_list() == [0.5, 0.0]
    assert frame["user"].to_list() == ["007", "7"]
    days = [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)]
    columns = {"y": [1, 0], "country": ["de", "fr"], "w": [1, 2], "user": days, "item": ["a", "b"]}
    frame = read(pl.DataFrame(columns), schema=WEIGHTED)
    assert frame["w"].to_list() == [1.0, 2.0]
    assert frame["user"].n_unique() == 2
    assert read(pl.DataFrame(columns | {"user": [3.0, 4.5]}), schema=WEIGHTED)["user"].to_list() == ["3", "4.5"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("-1,7", r"column 'w', row 2: expected a weight: a finite number of at least 0 .*, got '-1'"),
        ("nan,7", r"column 'w', row 2: expected a weight: .*, got 'nan'"),
        ("inf,7", r"column 'w', row 2: expected a weight: .*, got 'inf'"),
        ("1e39,7", r"column 'w', row 2: expected a weight: .*, got '1e39'"),
        (",7", r"column 'w', row 2: expected a weight: .*, got an empty cell"),
        ("much,7", r"column 'w', row 2: expected a weight: .*, got 'much'"),
        ("1,", r"column 'user', row 2: expected the group of the row, got an empty cell"),
    ],
)
def test_bad_weights_and_groups(read, cells, message):
    with pytest.raises(InputError, match=message):
        read(f"y,country,w,user,item\n1,de,1,7,a\n0,fr,{cells},b\n", schema=WEIGHTED)


def test_scoring_needs_neither_weight_nor_group(read):
    frame = read("country,item,w\nde,a,much\n", schema=WEIGHTED, need_label=False)
    assert frame["w"].to_list() == ["much"]


QUOTED_OTHERWISE = [
    # cells of a row between others, and what they hold
    ('5" disk', '5" disk'),
    ('a"b"c', 'a"b"c'),
    ('say ""hi""', 'say ""hi""'),
    (' "x"', ' "x"'),
    ('"5"" disk"', '5" disk'),
    ('"two\nlines, ""quoted"""', 'two\nlines, "quoted"'),
    ('"x"', "x"),
    ('\\"', '\\"'),
]


@pytest.mark.parametrize(("cell", "value"), QUOTED_OTHERWISE)
@pytest.mark.parametrize("others", [[], ['9" disk', '"a,b"', '"""q"""']])
def test_quotes_come_through(read, chunks, cell, value, others):
    cells = [*others, cell, "plain"]
    content = HEADER + "".join(f"1,de,{n},{each},,,h\n" for n, each in enumerate(cells))
    expected = [*['9" disk', "a,b", '"q"'][: len(others)], value, "plain"]
    frame = read(content)
    assert frame["item"].to_list() == expected
    assert frame["tags"].null_count() == len(cells)
    assert frame["ts"].to_list() == list(range(len(cells)))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (r'"a \"b\" c"', "row 2, column 'item': expected a quoted cell to end in a quote"),
        ('"a" b', "row 2, column 'item': expected a quoted cell to end in a quote"),
        ('"a', "row 2, column 'item': expected a quoted cell to end in a quote"),
        ('x,"a,b"c', "row 2, column 'tags': expected a quoted cell to end in a quote"),
    ],
)
def test_quotes_that_would_lose_characters(read, cell, message):
    with pytest.raises(InputError, match=message) as caught:
        read(HEADER + f"1,de,1,i,,,\n0,de,2,{cell},,1,\n" + "0,de,3,i,,1,x\n" * 100_000)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_quote_across_blocks_of_the_file(read, monkeypatch):
    """Wherever the file is cut to look at its quotes, one within a cell is not taken for its end."""
    content = HEADER + '1,de,1,"a ""b"" c",,,\n' * 3
    for size in range(1, 80):
        monkeypatch.setattr(csv_files, "BLOCK_BYTES", size)
        monkeypatch.setattr(csv_files.CsvFile, "_read_slowly", lambda *_: pytest.fail("read slowly"))
        assert read(content)["item"].to_list() == ['a "b" c'] * 3


FORMATS = [
    (GOOD.replace(",", ";"), {"separator": ";"}),
    (GOOD.replace(",", ";").replace("1.5", "1,5"), {"separator": ";", "decimal": ","}),
    (GOOD.replace(",", "\t"), {"separator": "\t"}),
    (GOOD.replace(",", "|").replace("a|b", '"a|b"').replace("007|8", '"007|8"'), {"separator": "|"}),
    ("sep=;\n" + GOOD.replace(",", ";"), {"separator": ";"}),
    ("sep=,\r\n" + GOOD.replace("\n", "\r\n"), {"separator": ","}),
    ('# exported, "today"\n# twice\n' + GOOD, {}),
    (GOOD.replace("\n", "\r"), {}),
    ("SEP=^\n" + GOOD.replace(",", "^"), {"separator": "^"}),
    ('"sep=^"\n' + GOOD.replace(",", "^"), {"separator": "^"}),
    ("\ufeffsep=;\r" + GOOD.replace(",", ";").replace("\n", "\r"), {"separator": ";"}),
]


@pytest.mark.parametrize(("content", "format"), FORMATS)
def test_other_ways_to_write_csv(read, content, format, chunks):
    expected = read(GOOD)
    assert read(content).equals(expected)
    assert read(content, csv=CsvOptions(**format)).equals(expected)


NUMBERS = Roles(needed=("n",), numbers=("n",))
LONG_CELL = "x" * (BEGINNING_BYTES // 2 + 10)


@pytest.mark.parametrize(
    ("text", "options", "roles", "expected"),
    [
        ("a,b\n1,2\n", {}, Roles(), CsvFormat()),
        ("a;b\n1;2\n", {}, Roles(), CsvFormat(";")),
        ("a;b\n1;2", {"decimal": ","}, Roles(), CsvFormat(";", ",")),
        ('a,b\r"x\ny",2\r', {}, Roles(), CsvFormat(",", ".", "\r")),
        # Rows that are not as wide as the header tell against a separator, those that are empty do not.
        ("a,b;c\n1;2\n\n1,1;2\n", {}, Roles(), CsvFormat(";")),
        ("a,b;c\n1;2\n1,1;2\n", {}, Roles(needed=("a", "b;c")), CsvFormat(",")),
        # Lines before the header.
        ("# a", {}, Roles(), CsvFormat()),
        ("# a\n", {}, Roles(), CsvFormat(skipped_lines=1)),
        ("# a\nb;c", {}, Roles(), CsvFormat(";", skipped_lines=1)),
        ("#a;b\n1;2\n", {}, Roles(), CsvFormat(";")),
        ("#a^b\n1^2\n", {"separator": "^"}, Roles(), CsvFormat("^")),
        ("sep=;\na;b\n1;2\n", {}, Roles(), CsvFormat(";", skipped_lines=1)),
        # Numbers.
        ("a;n\n1;2\n1;2,5", {}, NUMBERS, CsvFormat(";", ",")),
        ("a;n\n1\n1;2,5\n", {}, NUMBERS, CsvFormat(";", ",")),
        ("a;n\n1;2,5\n1;2.5\n", {}, NUMBERS, CsvFormat(";")),
        ("a;n\n1;2,5\n1;.5\n", {}, NUMBERS, CsvFormat(";")),
        ("a;n\n2,5;1\n", {}, NUMBERS, CsvFormat(";")),
        ("a;n\n1;2,500\n", {}, NUMBERS, CsvFormat(";")),
        ("a;n\n" + "1;2\n" * 198 + "1;2,5\n", {}, NUMBERS, CsvFormat(";", ",")),
        ("a;n\n" + "1;2\n" * 199 + "1;2,5\n", {}, NUMBERS, CsvFormat(";")),
        # What the beginning of a file holds of a cell, a row or several.
        (f"n;a\n1;{LONG_CELL}\n2,5;2\n", {}, NUMBERS, CsvFormat(";", ",")),
        (f"n;a\n1;{LONG_CELL}\n1;{LONG_CELL}\n2,5;2\n", {}, NUMBERS, CsvFormat(";")),
        (f"n;a\n2,5;{LONG_CELL}\n1;{LONG_CELL}\n", {}, NUMBERS, CsvFormat(";", ",")),
        (f"n;a\n2,5;{LONG_CELL}{LONG_CELL}\n", {}, NUMBERS, CsvFormat(";", ",")),
        (f"a;b,c\n{LONG_CELL};1,2\n1;{LONG_CELL},2\n", {}, Roles(), CsvFormat(",")),
        (f"#a;b\n{LONG_CELL};2\n{LONG_CELL};2\n", {}, Roles(), CsvFormat(";")),
    ],
)
def test_how_a_csv_file_is_written(tmp_path, text, options, roles, expected):
    path = tmp_path / "data.csv"
    path.write_bytes(text.encode())
    limit = csv.field_size_limit(1000)
    try:
        assert csv_format(path, CsvOptions(**options), roles) == expected
        # It is everybody's.
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(limit)


@pytest.mark.parametrize(
    ("format", "described"),
    [
        (CsvFormat(",", ".", "\n", 0), ""),
        (CsvFormat(";"), "separator ';'"),
        (CsvFormat(decimal=","), "decimal ','"),
        (CsvFormat(line_end="\r"), r"lines that end in '\r'"),
        (CsvFormat(skipped_lines=1), "1 line before the header left out"),
        (CsvFormat("\t", ",", skipped_lines=2), r"separator '\t', decimal ',', 2 lines before the header left out"),
    ],
)
def test_what_is_said_of_how_a_csv_file_is_written(format, described):
    assert format.described() == described


def test_csv_options_over_others():
    assert CsvOptions(";", ".").to_dict() == {"separator": ";", "decimal": "."}
    assert CsvOptions("|").over(CsvOptions(";", ",")) == CsvOptions("|", ",")
    assert CsvOptions(decimal=".").over(CsvOptions(";", ",")) == CsvOptions(";", ".")
    assert CsvOptions().over(CsvOptions(";", ",")) == CsvOptions(";", ",")
    assert CsvOptions("|", ".").over(CsvOptions()) == CsvOptions("|", ".")


@pytest.mark.parametrize(
    ("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars"), ("^", r"'\^'"), (",", "commas")]
)
def test_a_row_with_more_fields_than_the_header(read, separator, name):
    content = (HEADER + "1,de,1,i,,1,h,x\n").replace(",", separator)
    message = f"row 1 has 8 fields, the header has 7; quote a field that holds {name}$"
    with pytest.raises(InputError, match=message):
        read(content, csv=CsvOptions(separator))


def test_names_in_quotes(read):
    content = GOOD.replace("item", '"item ""x""\n(id)"')
    features = {'item "x"\n(id)': {"kind": "sparse"}}
    schema = Schema.from_dict({"label": "y", "scenario": "country", "features": features})
    assert read(content, schema=schema)['item "x"\n(id)'].to_list() == ["007", "8"]


@pytest.mark.parametrize("header", [HEADER, HEADER.replace("history", "")])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,de,1,i,,,\n0,de\n", r"row 2 has 2 fields, the header has 7"),
        ("1,de,1,i,,1,h\n1,de,1,i,,1,h,", r"row 2 has 8 fields, the header has 7; quote a field"),
        ("1,de,1,i,,1,h\n1,de,1,i,,1,", None),
        ("1,de,1,i\rj,,1,h\n", r"row 1 holds a carriage return outside quotes"),
        ('1,de,1,"i\rj",,1,h\n', None),
        ("1,de,1,i,,1,h\r\r\n1,de,1,i,,1,h\r", None),
    ],
)
def test_rows_of_another_number_of_fields(read, chunks, header, rows, message):
    """Also below a last column without a name, and where the file ends without a line feed."""
    features = {"item": {"kind": "sparse"}}
    schema = Schema.from_dict({"label": "y", "scenario": "country", "features": features})
    if message is None:
        items = read(header + rows, schema=schema, need_label=False)
        assert set(items["item"]) <= {"i", "i\rj"}
        assert set(items[items.columns[6]]) <= {"h", None}
    else:
        with pytest.raises(InputError, match=message):
            read(header + rows, schema=schema)


def test_a_carriage_return_within_a_cell_hides_no_separator(read):
    with pytest.raises(InputError, match="row 2 holds a carriage return"):
        read(GOOD.replace(",", ";").replace(";8;", ";8\r9;"))


def test_quotes_before_the_header_open_nothing(tmp_path):
    (tmp_path / "a").write_text('# 5" disks\nid",x\n1,2\n', encoding="utf-8")
    assert read_frame(tmp_path / "a").to_dicts() == [{'id"': "1", "x": "2"}]


def test_a_header_may_begin_with_the_sign_of_a_comment(tmp_path):
    (tmp_path / "a").write_text('#id,"of\ntwo",x\n1,2,3\n', encoding="utf-8")
    assert read_frame(tmp_path / "a").to_dicts() == [{"#id": "1", "of\ntwo": "2", "x": "3"}]
    (tmp_path / "a").write_text("# exported\n#id,x\n1,2\n", encoding="utf-8")
    assert read_frame(tmp_path / "a").to_dicts() == [{"#id": "1", "x": "2"}]
    (tmp_path / "a").write_text("#id\n1\n", encoding="utf-8")
    assert read_frame(tmp_path / "a").columns == ["1"]


def test_a_separator_that_has_to_be_named(read):
    content = GOOD.replace(",", "^")
    message = r"no column 'item'; it has one column only, '.*': if '\^' separates fields, name it with --separator"
    with pytest.raises(InputError, match=message):
        read(content)
    assert read(content, csv=CsvOptions("^")).equals(read(GOOD))
    with pytest.raises(InputError, match="if ' ' separates fields, name it with --separator"):
        read(GOOD.replace(",", " "))
    with pytest.raises(InputError, match=r"if ',' separates fields, name it with --separator"):
        read(GOOD, csv=CsvOptions("^"))


def test_numbers_with_a_decimal_comma(read):
    rows = ["1;de;1,5;i;;1,25;", "0,0;de;2;i;;-,5;", "1;de;3;i;;;"]
    header = HEADER.replace(",", ";")
    frame = read(header + "\n".join(rows))
    assert frame["price"].to_list() == [1.25, -0.5, None]
    assert frame["ts"].to_list() == [1.5, 2.0, 3.0]
    assert frame["y"].to_list() == [1, 0, 1]
    with pytest.raises(InputError, match=r"row 4: expected a number with a decimal comma, got '1\.234'"):
        read(header + "\n".join([*rows, "1;de;3;i;;1.234;"]), csv=CsvOptions(decimal=","))
    # 1,234 may be a thousand and more.
    thousands = header + "1;de;1;i;;1,234;\n"
    with pytest.raises(InputError, match=r"column 'price', row 1: expected a number, got '1,234'; .*--decimal"):
        read(thousands)
    assert read(thousands, csv=CsvOptions(decimal=","))["price"].to_list() == [1.234]
    quoted = HEADER + '1,de,1,i,,"1,5",\n'
    with pytest.raises(InputError, match="fields are separated by commas; a decimal comma cannot be told from them"):
        read(quoted, csv=CsvOptions(decimal=","))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": ";;"}, "separator: expected one ASCII character such as ';', got ';;'"),
        ({"separator": '"'}, "separator: expected one ASCII character"),
        ({"separator": "é"}, "separator: expected one ASCII character"),
        ({"separator": "€"}, "separator: expected one ASCII character such as ';', got '€'"),
        ({"separator": "a"}, "separator: expected one ASCII character such as ';', got 'a'"),
        ({"separator": "7"}, "separator: expected one ASCII character such as ';', got '7'"),
        ({"separator": "\r"}, "separator: expected one ASCII character"),
        ({"separator": "\n"}, "separator: expected one ASCII character"),
        ({"separator": ""}, "separator: expected one ASCII character"),
        ({"separator": 3}, "separator: expected one ASCII character such as ';', got 3"),
        ({"decimal": ";"}, "decimal: expected '.' or ',', got ';'"),
        ({"separator": ",", "decimal": ","}, "separator and decimal are both ','"),
    ],
)
def test_csv_options_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        CsvOptions(**options)


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_commas_separate_where_they_can(read, end):
    """More bars than commas, in the header too."""
    schema = Schema.from_dict({"label": "y", "scenario": "s", "features": {"a|b|c": {"kind": "multi"}}})
    frame = read(f"y,s,a|b|c{end}1,de,x|y|z{end}0,fr,x|y|z{end}", schema=schema)
    assert frame["a|b|c"].to_list() == ["x|y|z"] * 2


LONG = "x" * 3_000_000
CONTROL = "\x1b[31m\x07"


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (GOOD + f"1,{LONG},1,i,,{LONG},\n", {}),
        (GOOD + f'1,de,3,"{LONG}\n' * 3, {}),
        (GOOD + f"1,de,3,i,,{CONTROL * 100},\n", {}),
        (GOOD + f"1,de,{LONG},i,,,\n", {}),
        (GOOD + f"{LONG},de,1,i,,,\n", {}),
        (GOOD + f'1,de,1,i,"[{LONG}]",,\n', {}),
        (GOOD + f'1,de,1,i,"[""\\{LONG}""]",,\n', {}),
        (HEADER.replace("item", f"item{LONG}"), {}),
        (HEADER.replace("item", f'"item{LONG}'), {}),
        (HEADER.replace("item", ",".join(f"column {n}" for n in range(500))), {}),
        (f"{LONG},{LONG}\n", {}),
        (f"{CONTROL}\n", {}),
        (GOOD, {"csv": CsvOptions("|")}),
        (as_parquet(item=[{f"field {n}": 1 for n in range(500)}] * 2), {}),
        (as_parquet(price=[["1" * 500] * 500] * 2), {}),
    ],
)
def test_no_message_carries_more_than_80_characters_of_data(read, content, options):
    with pytest.raises(InputError) as caught:
        read(content, **options)
    message = str(caught.value).replace(str(caught.value).partition(":")[0], "")
    assert message.isprintable()
    assert message.count("x") <= 80
    assert message.count("column ") < 20
    assert len(message) <= 80 + 200
