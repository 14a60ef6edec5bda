"""The files of a run after any change: refused by name, or the same predictions to the last bit."""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from alterations import entries, flipped, mutated
from budget import examples
from hypothesis import given
from hypothesis import strategies as st
from refusals import limited_memory, result_of

from saml_rec.data import prepare
from saml_rec.data.preparation import PreparedData
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import predict
from saml_rec.run_directory import RunDirectory
from saml_rec.sealed import MARK, SEAL_BYTES, save
from saml_rec.training.loop import CheckpointTimes, TrainOptions, train

SCHEMA = Schema.from_dict(
    {
        "label": "y",
        "scenario": "s",
        "split": [0.6, 0.2, 0.2],
        "features": {
            "item": {"kind": "sparse", "dim": 2, "scenario_aware": True},
            "tags": {"kind": "multi", "dim": 2},
            "price": {"kind": "dense"},
            "history": {"kind": "sequence", "item": "item", "heads": 1, "max_length": 3},
        },
    }
)
OPTIONS = TrainOptions(epochs=2, batch_size=16, device="cpu", model_options={"hidden_dims": (3, 2)})
ROWS = 60
JSON_TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"NaN",
    b"1e999",
    b"-0",
    b"null",
    b"9" * 5000,
    b"\\u0000",
    b"\xff",
]
ZIP_TOKENS = [
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    MARK,
    b"\0" * 4,
    b"\xff" * 4,
    b"cos\nsystem\n",
    b"\x80\x02}.",
]


@dataclass(frozen=True, repr=False)
class Runs:
    """A finished run, one that was killed within its second epoch, and the table of both."""

    data: Path
    prepared: PreparedData
    finished: Path
    begun: Path
    predictions: pl.DataFrame

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # Or hypothesis prints all numbers.
        printer.text("Runs()")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    rows = range(ROWS)
    frame = pl.DataFrame(
        {
            "y": [(row * 7 % 5) % 2 for row in rows],
            "s": [("de", "fr")[row % 2] for row in rows],
            "item": [f"i{row % 4}" for row in rows],
            "tags": ["|".join(f"t{number}" for number in range(row % 3)) for row in rows],
            "price": [row / 8 for row in rows],
            "history": ["|".join(f"i{number % 4}" for number in range(row % 4)) for row in rows],
        }
    )
    data = folder / "data.csv"
    frame.write_csv(data)
    prepared = prepare(data, SCHEMA, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        # Every other checkpoint is one within an epoch.
        copies = iter(range(100))
        saved = RunDirectory(folder / "finished").checkpoint

        def save_and_keep(path: Path, kind: str, content: dict[str, Any]) -> None:
            save(path, kind, content)
            if path == saved:
                kept = folder / f"begun-{next(copies)}"
                kept.mkdir()
                shutil.copy(path, kept / path.name)

        patch.setattr("saml_rec.training.loop.save", save_and_keep)
        train(prepared, SCHEMA, OPTIONS, folder / "finished", data_path=data, checkpoints=CheckpointTimes(1, None))
    begun = [kept for kept in sorted(folder.glob("begun-*")) if RunDirectory(kept).load_checkpoint()["begun"]]
    return Runs(data, prepared, folder / "finished", begun[-1], predict(folder / "finished", data))


@pytest.fixture(autouse=True)
def memory(runs):
    with limited_memory():
        yield


@pytest.fixture
def run(tmp_path: Path, runs: Runs) -> RunDirectory:
    """A copy of the finished run."""
    return RunDirectory(shutil.copytree(runs.finished, tmp_path / "run"))


@pytest.fixture
def begun(tmp_path: Path, runs: Runs) -> RunDirectory:
    """A copy of the run that was killed."""
    return RunDirectory(shutil.copytree(runs.begun, tmp_path / "run"))


def resume(run: RunDirectory, runs: Runs) -> Any:
    return train(runs.prepared, SCHEMA, OPTIONS, run.path, resume=True, data_path=runs.data)


def refused_by_name(read, path: Path) -> bool:
    try:
        read()
    except InputError as error:
        return str(path) in str(error)
    return False


@examples(120)
@given(data=st.data())
def test_a_model_that_was_changed(run, runs, data):
    good = (runs.finished / "model.pt").read_bytes()
    content = data.draw(flipped(good, entries(good)) | mutated([good], ZIP_TOKENS))
    run.model.write_bytes(content)
    found = result_of(lambda: predict(run.path, runs.data), run.model, run.path)
    if content == good:
        assert found is not None
    if found is None:
        assert refused_by_name(lambda: predict(run.path, runs.data), run.model)
    else:
        assert found.equals(runs.predictions)


@examples(100)
@given(data=st.data(), name=st.sampled_from(["history.json", "metrics.json"]))
def test_results_that_were_changed(run, runs, data, name):
    """Predictions do not read them; what does, refuses them."""
    good = (runs.finished / name).read_bytes()
    content = data.draw(flipped(good) | mutated([good], JSON_TOKENS))
    for file in (run.history, run.metrics):
        shutil.copy(runs.finished / file.name, file)
    (run.path / name).write_bytes(content)
    if content == good:
        assert resume(run, runs).already_finished
        return
    assert result_of(lambda: resume(run, runs), run.path / name, run.path) is None
    assert refused_by_name(lambda: resume(run, runs), run.path / name)


@examples(80)
@given(data=st.data())
def test_a_checkpoint_that_was_changed(begun, runs, data):
    good = (runs.begun / "checkpoint.pt").read_bytes()
    content = data.draw(flipped(good, entries(good)) | mutated([good], ZIP_TOKENS))
    begun.checkpoint.write_bytes(content)
    if content == good:
        begun.load_checkpoint()
        return
    assert result_of(lambda: resume(begun, runs), begun.checkpoint, begun.path) is None
    assert refused_by_name(lambda: resume(begun, runs), begun.checkpoint)


def test_the_whole_runs_themselves(run, runs, tmp_path):
    assert predict(run.path, runs.data).equals(runs.predictions)
    assert resume(run, runs).already_finished
    begun = RunDirectory(shutil.copytree(runs.begun, tmp_path / "begun"))
    resume(begun, runs)
    assert predict(begun.path, runs.data).equals(runs.predictions)


# --- a change with the digest that belongs to it ----------------------------------------------------------------------

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4)
    | st.sampled_from([[], {}, "ж" * 200, "\x1b[31m\n", "cpu", "cuda:7", "saml", "star", [[[]]], {"a": 1}])
    | st.sampled_from([torch.zeros(0), torch.zeros(3, 2), torch.tensor(7), torch.ones(2, dtype=torch.bool)])
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value within nested ones, the whole not included."""
    items: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list | tuple):
        items = list(enumerate(content))
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def changed(content: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy with the value at ``path`` replaced by ``change(value)``, or left out where that is ``...``."""
    if not path:
        return change(content)
    key, *rest = path
    inner = changed(content[key], tuple(rest), change)
    if isinstance(content, dict):
        others = {name: value for name, value in content.items() if name != key}
        return others if inner is ... else {name: inner if name == key else value for name, value in content.items()}
    values = list(content)
    values[key : key + 1] = [] if inner is ... else [inner]
    return type(content)(values)


def draw_changed(draw: Any, content: Any) -> Any:
    """One or two values of others, of other shapes, or lost."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(content)))
        kind = draw(st.sampled_from(["other", "other", "lost", "near"]))
        new = draw(leaves)

        def change(value: Any, kind: str = kind, new: Any = new) -> Any:
            if kind == "lost":
                return ...
            if kind == "near" and isinstance(value, torch.Tensor):
                return value[:-1] if value.ndim else value + 1
            if kind == "near" and isinstance(value, int | float):
                return -value - 1
            if kind == "near" and isinstance(value, str):
                return value + "x"
            return new

        content = changed(content, path, change)
    return content


def save_sealed(path: Path, content: dict[str, Any]) -> bool:
    """False for what :func:`saml_rec.sealed.save` itself refuses."""
    try:
        save(path, "any", content)
    except InputError:
        return False
    return True


@examples(150)
@given(data=st.data())
def test_a_model_that_somebody_made(run, runs, data):
    good = torch.load(runs.finished / "model.pt", weights_only=True)
    if save_sealed(run.model, draw_changed(data.draw, good)):
        found = result_of(lambda: predict(run.path, runs.data), run.model, run.path, runs.data)
        assert found is None or found.height == ROWS
        result_of(lambda: resume(run, runs), run.model, run.path, runs.data)


@examples(100)
@given(data=st.data())
def test_an_archive_of_version_0_1(run, runs, data):
    """Without a digest: what the formats of zip and pickle check is all that there is."""
    content = torch.load(runs.finished / "model.pt", weights_only=True)
    file = io.BytesIO()
    torch.save({**content, "format": 1}, file)
    assert len(file.getvalue()) > SEAL_BYTES
    run.model.write_bytes(data.draw(mutated([file.getvalue()], ZIP_TOKENS, most=3)))
    found = result_of(lambda: predict(run.path, runs.data), run.model, run.path, runs.data)
    assert found is None or found.height == ROWS
