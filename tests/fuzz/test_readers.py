"""Any bytes as a table: the rows that an independent reader finds, or one line that says why not."""

from pathlib import Path

import plain_csv
import polars as pl
import pytest
from alterations import corpus, mutated
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from refusals import MARK, limited_memory, result_of

from saml_rec.data import readers
from saml_rec.data.csv_format import CsvFormat, CsvOptions
from saml_rec.data.readers import open_table, read_frame, read_table, roles_of
from saml_rec.data.schema import Schema
from saml_rec.data.sources import open_bytes
from saml_rec.data.values import TRUTH, as_lists
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
FILES = corpus("csv")
TEXTS = [content for name, content in FILES.items() if name.endswith(".csv")]
PACKED = [content for name, content in FILES.items() if name.endswith((".gz", ".zst"))]
PARQUET = [content for name, content in FILES.items() if name.endswith(".parquet")]
TOKENS = [
    *(b',;\t|\n\r"'[place : place + 1] for place in range(7)),
    *(b'""', b'"""', b'","', b'"\n', b'\n"', b"\r\n", b"\r\r\n", b"\n\n", b"\xef\xbb\xbf", b"\0", b"\xff", b"\xc3"),
    *(b"sep=;\n", b"# ", b"#a,b\n", b"1,5", b"0.5", b"1e400", b"-0", b"nan", b"inf", b"True", b"007", b"NULL"),
    *(
        b"['a']",
        b"[1, 2.0]",
        b"[",
        b"]",
        b"\\u00e9",
        b"\\",
        b"'",
        b"9" * 30,
        b"2024-01-02",
        b"9999999-01-01",
        b"+99:99",
    ),
    *(MARK.encode() * 100, b"\x1b[31m", "\u2028".encode(), "\x85".encode(), b" ", b"PAR1", b"\x1f\x8b"),
]


@pytest.fixture(scope="module", autouse=True)
def memory():
    with limited_memory():
        yield


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data"


def expected_rows(path: Path, form: CsvFormat) -> tuple[list[str], list[list[plain_csv.Cell]]] | None:
    """Names and rows of a CSV file written as ``form`` says; None where it is none."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
        *_, text = text.split(form.line_end, form.skipped_lines) if form.skipped_lines else [text]
        header, *rows = plain_csv.records(text, form.separator, form.line_end)
    except ValueError:
        return None
    while rows and not rows[-1]:
        rows.pop()
    if len(header) == 1:
        # One empty cell is a line without any character.
        rows = [row or [plain_csv.Cell("", False)] for row in rows]
    if not header or any(len(row) != len(header) for row in rows):
        return None
    names = [cell.text for cell in header]
    return (names, rows) if len(set(names)) == len(names) else None


def check_frame(path: Path, frame: pl.DataFrame, form: CsvFormat) -> None:
    """A frame holds what an independent reader finds in the file; a quoted cell that is empty may be null."""
    expected = expected_rows(path, form)
    assert expected is not None, f"read {frame}"
    names, rows = expected
    assert frame.columns == names
    assert frame.height == len(rows)
    for found, row in zip(frame.iter_rows(), rows, strict=True):
        for value, cell in zip(found, row, strict=True):
            assert value == cell.text or (value is None and cell.text == ""), (found, row)


def check_text(path: Path, options: CsvOptions | None = None) -> None:
    """All promises about a file that is CSV, or should be."""
    frame = result_of(lambda: read_frame(path, options), path)
    if frame is not None and (form := open_table(path, options).format) is not None:
        check_frame(path, frame, form)
    check_table(path, options)


def check_table(path: Path, options: CsvOptions | None = None) -> None:
    """What is read of a table by its schema, whatever the size of the parts it is read in."""
    table = result_of(lambda: read_table(path, SCHEMA, csv=options), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_ROWS", 2)
        in_parts = result_of(lambda: read_table(path, SCHEMA, csv=options), path)
    assert (table is None) == (in_parts is None)
    if table is None or in_parts is None:
        return
    for name in ("tags", "history"):
        if table[name].dtype != in_parts[name].dtype:
            table, in_parts = (each.with_columns(as_lists(each[name], "|")) for each in (table, in_parts))
    assert table.equals(in_parts)
    assert table["y"].is_in([0, 1]).all()
    assert not table["country"].str.strip_chars().is_in([""]).any()
    assert not table["country"].null_count()
    assert not table["ts"].null_count()
    price = table["price"].drop_nulls()
    assert ((price.abs() < 3.5e38) & price.is_not_nan()).all()
    opened = open_table(path, options, roles_of(SCHEMA))
    if opened.format is None:
        return
    expected = expected_rows(path, opened.format)
    assert expected is not None, f"read {table}"
    names, rows = expected
    assert table.height == len(rows)
    for name in ("country", "item"):
        cells = [row[names.index(name)].text for row in rows]
        assert table[name].to_list() == [TRUTH.get(cell, cell) or None for cell in cells]


REFUSED = {
    "carriage-return-within.csv": "row 1 holds a carriage return outside quotes",
    "damaged-deflate.csv.gz": "cannot be read: Error -3 while decompressing data",
    "empty-field-too-many.csv": "row 1 has 8 fields, the header has 7",
    "quote-before-the-header.csv": "row 1 has 8 fields, the header has 7",
    "unnamed-last-column.csv": "row 1 has 1 fields, the header has 7",
}
"""Files of the corpus that are no tables; all others are."""


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_corpus(path, name):
    path.write_bytes(FILES[name])
    check_text(path)
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            read_frame(path)
    else:
        assert read_frame(path).height


def test_the_independent_reader_says_what_a_file_holds():
    text = 'a,b\r\n"x ""y""",\r\r\n5" disk,"1\r2"'
    assert [[cell.text for cell in line] for line in plain_csv.records(text, ",", "\n")] == [
        ["a", "b"],
        ['x "y"', ""],
        ['5" disk', "1\r2"],
    ]
    for wrong in ('"a', '"a"b', "a\rb"):
        with pytest.raises(plain_csv.Malformed):
            plain_csv.records(wrong, ",", "\n")


@examples(300)
@given(content=mutated(TEXTS, TOKENS))
def test_text_that_is_nearly_a_table(path, content):
    path.write_bytes(content)
    check_text(path)


@examples(60)
@given(content=st.binary(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=20).map(b"".join))
def test_any_bytes(path, content):
    path.write_bytes(content)
    check_text(path)


@examples(100)
@given(content=mutated(PACKED, [b"\0", b"\xff", b"\x28\xb5\x2f\xfd", b"\x1f\x8b\x08\0"], most=3))
def test_packed_files_that_are_damaged(path, content):
    path.write_bytes(content)
    check_text(path)


@examples(150)
@given(content=mutated(PARQUET, [b"PAR1", b"\0", b"\xff\xff\xff\x7f", b"\x80" * 9], most=3))
def test_parquet_files_that_are_damaged(path, content):
    path.write_bytes(content)
    check_text(path)
