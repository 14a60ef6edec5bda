"""Data sets to try things on."""

from pathlib import Path
from typing import Any

import click

from saml_rec.cli.options import (
    FILE,
)
from saml_rec.models.hyperparameters import MOST_SEED, Whole

MOST_SCENARIOS = 2**16
"""Their relation is a square matrix."""
MOST_IDS = 2**31 - 1


@click.group()
def data() -> None:
    """Write a data set to try things on, with its schema."""


@data.command("ml-100k")
@click.option("--out", type=FILE, required=True, help="Directory for the table and the schema; made if missing.")
@click.option(
    "--scenario",
    type=click.Choice(["age", "occupation"]),
    default="age",
    show_default=True,
    help="What tells scenarios apart: the user's age group or occupation.",
)
def ml_100k(out: Path, scenario: Any) -> None:
    """MovieLens 100k: 100,000 ratings of films, fetched once with pip and kept in the user's cache."""
    from saml_rec.console import print_written
    from saml_rec.datasets.ml100k import write_ml100k

    print_written(write_ml100k(out, scenario=scenario))


@data.command()
@click.option("--out", type=FILE, required=True, help="Directory for the files; made if missing.")
@click.option("--scenarios", type=Whole(most=MOST_SCENARIOS), default=4, show_default=True, help="Number of scenarios.")
@click.option("--rows", type=Whole(), default=20_000, show_default=True, help="Rows in all.")
@click.option("--users", type=Whole(most=MOST_IDS), default=400, show_default=True, help="Users to draw from.")
@click.option("--items", type=Whole(most=MOST_IDS), default=200, show_default=True, help="Items to draw from.")
@click.option(
    "--seed",
    type=Whole(most=MOST_SEED),
    default=0,
    show_default=True,
    help="The same seed and sizes give the same files.",
)
@click.option("--smallest-share", type=float, help="Share of the rows for the last scenario, at most 1/SCENARIOS.")
@click.option(
    "--relation",
    type=click.Choice(["drawn", "twin"]),
    default="drawn",
    show_default=True,
    help="How scenarios share tastes: by random shares, or not at all, but that the last one has another's taste.",
)
def synthetic(out: Path, **sizes: Any) -> None:
    """Rows in which the scenarios share tastes to a known degree, and a file with what was planted."""
    from saml_rec.console import print_written
    from saml_rec.datasets.synthetic import write_synthetic

    print_written(write_synthetic(out, **sizes))
