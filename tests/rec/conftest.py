"""A small data set with every kind of feature, and the command line as a function."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars
import pytest
from click.testing import CliRunner, Result

SCHEMA = """\
label = "click"
scenario = "country"

[features.user]
kind = "sparse"
scenario_aware = true
dim = 8

[features.item]
kind = "sparse"
dim = 8

[features.tags]
kind = "multi"
dim = 4

[features.age]
kind = "dense"

[features.history]
kind = "sequence"
item = "item"
max_length = 5
"""


WEIGHTED_SCHEMA = 'weight = "importance"\ngroup = "user"\n' + SCHEMA


@dataclass(frozen=True)
class Dataset:
    """A table and its schema on disk."""

    data: Path
    schema: Path
    frame: polars.DataFrame


def make_frame(rows: int = 400, seed: int = 0) -> polars.DataFrame:
    """Clicks that depend on the user, the item and the country; ``price`` is no feature."""
    draw = np.random.default_rng(seed)
    user, item = draw.integers(0, 20, rows), draw.integers(0, 15, rows)
    country = draw.choice(["de", "fr", "[it]"], rows, p=[0.5, 0.3, 0.2])
    age = draw.normal(40, 10, rows)
    taste = draw.normal(size=(20,))[user] * draw.normal(size=(15,))[item] + 0.5 * (country == "de")
    click = (taste + 0.3 * draw.normal(size=rows) > 0).astype(int)
    words = [[f"t{number}" for number in draw.integers(0, 6, count)] for count in draw.integers(0, 4, rows)]
    past = [[f"i{number}" for number in draw.integers(0, 15, count)] for count in draw.integers(0, 8, rows)]
    return polars.DataFrame(
        {
            "click": click,
            "country": country,
            "user": [f"u{number}" for number in user],
            "item": [f"i{number}" for number in item],
            "tags": ["|".join(row) for row in words],
            "age": age.round(1),
            "history": ["|".join(row) for row in past],
            "price": draw.uniform(1, 9, rows).round(2),
        }
    )


def with_importance(frame: polars.DataFrame) -> polars.DataFrame:
    """With weights of 0, ½, 1, 1½, 2, for WEIGHTED_SCHEMA."""
    return frame.with_columns(importance=polars.Series(np.random.default_rng(1).integers(0, 5, len(frame)) / 2))


def write_dataset(directory: Path, frame: polars.DataFrame, schema: str = SCHEMA) -> Dataset:
    dataset = Dataset(directory / "clicks.csv", directory / "schema.toml", frame)
    frame.write_csv(dataset.data)
    dataset.schema.write_text(schema, encoding="utf-8")
    return dataset


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """400 rows in three scenarios. Do not change its files: copy them."""
    return write_dataset(tmp_path_factory.mktemp("data"), make_frame())


@pytest.fixture(scope="session")
def weighted_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The rows of ``small_dataset`` with weights, and users as groups. Do not change its files: copy them."""
    frame = with_importance(make_frame())
    return write_dataset(tmp_path_factory.mktemp("data"), frame, WEIGHTED_SCHEMA)


@pytest.fixture
def weighted_rows(dataset_of: Callable[..., Dataset]) -> Callable[[int], Dataset]:
    """So many rows like those of ``weighted_dataset``."""
    return lambda rows: dataset_of(with_importance(make_frame(rows)), WEIGHTED_SCHEMA)


@pytest.fixture
def dataset_of(tmp_path: Path) -> Callable[..., Dataset]:
    """Writes a frame, by default that of ``small_dataset``, with a schema into the test's directory."""

    def write(frame: polars.DataFrame | None = None, schema: str = SCHEMA, rows: int = 400) -> Dataset:
        return write_dataset(tmp_path, make_frame(rows) if frame is None else frame, schema)

    return write


@pytest.fixture
def saml_rec() -> Callable[..., Result]:
    """Runs the command in this process."""
    from saml_rec.cli import main

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="saml-rec")

    return run


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python in a process of its own."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.fixture
def started() -> Callable[..., subprocess.Popen[bytes]]:
    """Starts Python in a process of its own, and returns when that says that it is ready.

    Its output has no buffer: one would also take lines after the first, and communicate() does not read buffers.
    """

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n", child.communicate(timeout=240)[1].decode()
        return child

    return start


@pytest.fixture(scope="session")
def finished_run(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of SAML on ``small_dataset``. Do not write to it: copy it."""
    from saml_rec.cli import main

    out = tmp_path_factory.mktemp("runs") / "finished"
    arguments = ["train", "--data", small_dataset.data, "--schema", small_dataset.schema, "--out", out]
    arguments += ["--epochs", 2, "--batch-size", 64, "--hidden-dims", "8,4"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def train_one_epoch(monkeypatch):
    """Trains as train does, and is interrupted in the second epoch."""
    from saml_rec.training import loop

    run_epoch = loop._run_epoch

    def stop_in_second(state, *arguments):
        if state.history:
            raise KeyboardInterrupt
        return run_epoch(state, *arguments)

    def call(data, schema, options, out):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_run_epoch", stop_in_second)
            with pytest.raises(KeyboardInterrupt):
                loop.train(data, schema, options, out)
        return out

    return call
