"""What --data may name: files, folders, patterns, compressed files; how rows lie in files does not show."""

import gzip

import polars as pl
import pytest
import zstandard

from saml_rec.data import prepare, read_table
from saml_rec.data.schema import load_schema
from saml_rec.data.sources import table_files
from saml_rec.errors import InputError


def compressed(path, how):
    content = path.read_bytes()
    name = path.with_name(f"{path.name}.{how}")
    name.write_bytes(gzip.compress(content) if how == "gz" else zstandard.compress(content))
    return name


@pytest.fixture
def parts(tmp_path, small_dataset):
    """The rows of ``small_dataset`` in a folder of four files of four kinds."""
    folder = tmp_path / "parts"
    folder.mkdir()
    pieces = [small_dataset.frame.slice(start, 100) for start in range(0, 400, 100)]
    pieces[0].write_csv(folder / "0.csv")
    pieces[1].write_parquet(folder / "1.parquet")
    for number, how in ((2, "gz"), (3, "zst")):
        pieces[number].write_csv(folder / f"{number}.csv")
        compressed(folder / f"{number}.csv", how)
        (folder / f"{number}.csv").unlink()
    return folder


def test_lists_and_separated_text_beside_each_other(parts, small_dataset):
    schema = load_schema(small_dataset.schema)
    frame = pl.read_parquet(parts / "1.parquet")
    frame.with_columns(pl.col("tags", "history").str.split("|")).write_parquet(parts / "1.parquet")
    expected, found = prepare(small_dataset.data, schema, seed=0), prepare(parts, schema, seed=0)
    assert found.encoder.vocabularies == expected.encoder.vocabularies
    assert found.encoder.moments["age"] == pytest.approx(expected.encoder.moments["age"], rel=1e-12)


def fingerprints(paths, schema):
    return {name: table.fingerprint() for name, table in prepare(paths, schema, seed=0).tables.items()}


def test_a_folder_a_pattern_several_files_and_one_are_the_same_table(parts, small_dataset):
    schema = load_schema(small_dataset.schema)
    expected = fingerprints(small_dataset.data, schema)
    several = [parts / name for name in ("0.csv", "1.parquet", "2.csv.gz", "3.csv.zst")]
    for paths in (parts, parts / "*", str(parts / "[0-3].*"), several, [parts / "0.csv", parts / "[1-3].*"]):
        assert fingerprints(paths, schema) == expected


@pytest.mark.parametrize("how", ["gz", "zst"])
def test_a_compressed_file_by_any_name(small_dataset, tmp_path, how):
    schema = load_schema(small_dataset.schema)
    file = tmp_path / "clicks"
    file.write_bytes(compressed_bytes := _bytes(small_dataset.data.read_bytes(), how))
    assert fingerprints(file, schema) == fingerprints(small_dataset.data, schema)
    for size in (5, len(compressed_bytes) // 2, len(compressed_bytes) - 5):
        file.write_bytes(compressed_bytes[:size])
        with pytest.raises(InputError, match=rf"^{file}[^\n]*$"):
            prepare(file, schema, seed=0)


def _bytes(content, how):
    return gzip.compress(content) if how == "gz" else zstandard.compress(content)


def test_what_a_folder_holds_beside_tables_is_left_alone(parts):
    for name in ("_SUCCESS", ".0.csv", "README.md", "_part.csv"):
        (parts / name).write_text("no table", encoding="utf-8")
    assert [file.name for file in table_files(parts)] == ["0.csv", "1.parquet", "2.csv.gz", "3.csv.zst"]


def test_nothing_there(tmp_path, parts):
    for paths, message in (
        (tmp_path / "missing-*.csv", "no file matches this pattern"),
        (tmp_path, "this directory has no files that end in"),
        ([], "no data: expected a file, a folder or a pattern"),
        ([parts, parts / "0.csv"], "0.csv is named twice"),
    ):
        with pytest.raises(InputError, match=message):
            table_files(paths)


def test_a_file_that_lacks_a_column_is_named_before_any_row_is_read(parts, small_dataset):
    pl.read_parquet(parts / "1.parquet").drop("age").write_parquet(parts / "1.parquet")
    (parts / "0.csv").write_text((parts / "0.csv").read_text() + "2,de,u,i,t,1,,1\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"1\.parquet has no column 'age'"):
        prepare(parts, load_schema(small_dataset.schema), seed=0)


def test_rows_are_counted_in_their_file(parts, small_dataset):
    frame = pl.read_parquet(parts / "1.parquet")
    frame.with_columns(click=pl.Series([*frame["click"][:41], 7, *frame["click"][42:]])).write_parquet(
        parts / "1.parquet"
    )
    with pytest.raises(InputError, match=r"1\.parquet: column 'click', row 42: expected a label of 0 or 1, got 7"):
        prepare(parts, load_schema(small_dataset.schema), seed=0)


def test_compressed_parquet_is_refused(tmp_path, small_dataset):
    file = tmp_path / "clicks.parquet"
    small_dataset.frame.write_parquet(file)
    with pytest.raises(InputError, match="is compressed Parquet; expected Parquet as it is"):
        read_table(compressed(file, "gz"), load_schema(small_dataset.schema))
