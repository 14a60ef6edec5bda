"""Reading CSV and Parquet: strings stay what they are, and every bad input is one clear line."""

import datetime
from decimal import Decimal

import polars as pl
import pytest

from saml_rec.data import readers
from saml_rec.data.cells import conform
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


@pytest.mark.parametrize("values", [["0", "1"], ["0.0", "1.0"], ["False", "TRUE"], [" 0", "1 "]])
def test_labels_in_csv(read, values):
    content = HEADER + "".join(f"{value},de,1,i,,1,\n" for value in values)
    assert read(content)["y"].to_list() == [0, 1]


@pytest.mark.parametrize(
    "values", [[False, True], [0.0, 1.0], pl.Series(["0", "1"], dtype=pl.Categorical), [Decimal("0"), Decimal("1.0")]]
)
def test_labels_in_parquet(read, values):
    assert read(as_parquet(y=values))["y"].to_list() == [0, 1]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([7, None], ["7", None]),
        ([7.0, float("nan")], ["7", None]),
        (pl.Series([7.0, None], dtype=pl.Float32), ["7", None]),
        ([7.5, 8.0], ["7.5", "8"]),
        ([True, None], ["true", None]),
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
        (pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)), [["1", "2"], ["3", "4"]]),
        (pl.Series([["a"], None], dtype=pl.List(pl.Categorical)), [["a"], None]),
        ([[], []], [[], []]),
        ([12, None], ["12", None]),
        (["1|2", ""], ["1|2", None]),
        ([None, None], [None, None]),
    ],
)
def test_lists_in_parquet(read, column, expected):
    frame = read(as_parquet(history=column, tags=column))
    assert frame["history"].to_list() == expected
    assert frame["tags"].to_list() == expected


@pytest.mark.parametrize("column", [["1.5", " NaN "], [1.5, float("nan")], [Decimal("1.5"), None], ["1.50", " "]])
def test_dense_columns(read, column):
    assert read(as_parquet(price=column))["price"].to_list() == [1.5, None]


UTC = datetime.UTC


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["3", " -2"], [3, -2]),
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
    ],
)
def test_times_in_csv(read, texts, expected):
    content = HEADER + "".join(f"{index % 2},de,{text},i,,1,\n" for index, text in enumerate(texts))
    assert read(content)["ts"].to_list() == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1.5, 2.5], [1.5, 2.5]),
        (pl.Series([1, 2], dtype=pl.UInt64), [1.0, 2.0]),
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


@pytest.mark.parametrize("value", ["2024-02-30", "2024-1-5", "yesterday", "2024-01-01T25:00", ""])
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
    (GOOD.replace(",", ";").encode(), "no column 'item'; its header holds semicolons: expected fields separated"),
    (GOOD.replace(",", "\t").encode(), "no column 'item'; its header holds tabs"),
    (GOOD.replace(",item,", ",y,").encode(), "more than one column 'y'"),
    (GOOD.replace(",item,", ",itme,").encode(), "no column 'item'; did you mean 'itme'.*it has 'y', 'country', 'ts'"),
    (GOOD.encode() + b"1,de,12,i,a", r"row 3 has 5 fields, the header has 7$"),
    (GOOD.encode().replace(b"\n0", b"\n\n0"), r"row 2 has 0 fields, the header has 7$"),
    (GOOD.encode() + b'1,de,3,"open,,1,\n', "is not well-formed CSV"),
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
        ({"price": [[1.0], [2.0]]}, "column 'price' holds List"),
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
    assert read("y,s,part\n1,a,train\n0,a,test\n", schema=SPLIT)["part"].to_list() == ["train", "test"]
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
