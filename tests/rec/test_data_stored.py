"""Encoded tables on disk: the same rows as in memory, read in blocks, kept between runs, safe against kills."""

import json
import os
import signal
import time
from itertools import count

import numpy as np
import polars as pl
import pytest
import torch

from saml_rec.data import cells, order, prepare, readers, stored, table
from saml_rec.data import preparation as preparation_module
from saml_rec.data.cache import Cache
from saml_rec.data.order import Share
from saml_rec.data.schema import load_schema
from saml_rec.data.table import joined
from saml_rec.errors import InputError
from saml_rec.evaluation import scoring
from saml_rec.evaluation.scoring import evaluate, predict
from saml_rec.training import TrainOptions, train

ROWS = 2000
SMALL = TrainOptions(model="saml", epochs=2, batch_size=96, model_options={"hidden_dims": (8, 4), "dropout": 0.1})


@pytest.fixture
def tiny(monkeypatch):
    """Chunks of 450 rows, blocks of 32, shards of 128, 16 lanes; nothing is held in memory."""
    for module, name, value in (
        (readers, "CHUNK_ROWS", 450),
        (order, "BLOCK_ROWS", 32),
        (order, "LANES", 16),
        (order, "WINDOW_ROWS", 512),
        (stored, "BLOCK_ROWS", 32),
        (stored, "LANES", 16),
        (stored, "WINDOW_ROWS", 512),
        (stored, "SHARD_ROWS", 128),
        (stored, "ROWS_PER_BLOCK", 64),
        (table, "ROWS_PER_BLOCK", 64),
        (preparation_module, "MEMORY_ROWS", 100),
        (scoring, "PREDICTION_ROWS", 300),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def big(dataset_of):
    return dataset_of(rows=ROWS)


@pytest.fixture
def schema(big):
    return load_schema(big.schema)


@pytest.fixture
def on_disk(tiny, big, schema, tmp_path):
    return prepare(big.data, schema, seed=0, cache=tmp_path / "cache")


@pytest.fixture
def in_memory(tiny, big, schema, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparation_module, "MEMORY_ROWS", ROWS)
        return prepare(big.data, schema, seed=0)


def rows_of(batches):
    """One tuple a row, whatever its batch."""
    found = []
    for batch in batches:
        features = [batch["features"][name] for name in sorted(batch["features"])]
        for row in range(len(batch["scenario"])):
            ids = [tuple(i for i in f[row].reshape(-1).tolist() if i) for f in features]
            found.append((int(batch["scenario"][row]), float(batch["label"][row]), *batch["dense"][row].tolist(), *ids))
    return found


def test_the_same_rows_as_in_memory(on_disk, in_memory):
    assert on_disk.encoder == in_memory.encoder
    for name, expected in in_memory.tables.items():
        found = on_disk.tables[name]
        assert len(found) == len(expected)
        assert found.fingerprint() == expected.fingerprint() == found.whole().fingerprint()
        assert torch.equal(found.label, expected.label)
        assert torch.equal(found.scenario_counts(), expected.scenario_counts())
        assert rows_of(found.batches(70)) == rows_of(expected.batches(70))
    assert len(on_disk.tables["train"]) == 1600 > order.WINDOW_ROWS


def test_an_epoch_has_every_row_once_in_another_order(on_disk, in_memory):
    epochs = [rows_of(on_disk.tables["train"].batches(96, generator=torch.Generator().manual_seed(s))) for s in (0, 1)]
    expected = rows_of(in_memory.tables["train"].batches(96))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected)
    assert epochs[0] != epochs[1] != expected


@pytest.mark.parametrize("processes", [2, 5, 16])
@pytest.mark.parametrize("place", ["on_disk", "in_memory"])
def test_processes_together_have_the_batches_of_one(request, place, processes):
    train_table = request.getfixturevalue(place).tables["train"]

    def batches(share):
        return train_table.batches(50, generator=torch.Generator().manual_seed(3), share=share, first_batch=2)

    shares = [list(batches(Share(rank, processes))) for rank in range(processes)]
    for whole, *parts in zip(batches(Share()), *shares, strict=True):
        assert sorted(rows_of([whole])) == sorted(rows_of(parts))


def test_processes_read_their_own_blocks_only(on_disk, monkeypatch):
    read, block = [], stored.StoredTable.block
    monkeypatch.setattr(stored.StoredTable, "block", lambda self, number: read.append(number) or block(self, number))
    for _ in on_disk.tables["train"].batches(50, generator=torch.Generator().manual_seed(0), share=Share(1, 4)):
        pass
    # Three full windows share whole blocks; the last one's parts may touch a neighbour's.
    assert len(read) <= 1600 / 32 / 4 + 8


def test_training_from_disk_is_training_from_memory(on_disk, in_memory, schema, tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "WINDOW_ROWS", 10**6)
    results = [train(data, schema, SMALL, tmp_path / name) for name, data in (("disk", on_disk), ("memory", in_memory))]
    assert results[0].metrics["overall"] == results[1].metrics["overall"]
    assert results[0].history[-1]["train_loss"] == results[1].history[-1]["train_loss"]


def test_a_whole_run_from_disk(on_disk, big, schema, tmp_path):
    out = tmp_path / "run"
    metrics = train(on_disk, schema, SMALL, out, data_path=big.data).metrics
    assert metrics["data"]["rows"] == {"train": 1600, "valid": 200, "test": 200}
    assert evaluate(out)["overall"] == metrics["overall"]
    assert evaluate(out, split="train")["overall"]["rows"] == 1600
    found = predict(out, big.data)["prediction"]
    assert found.len() == ROWS
    assert found.null_count() == 0


def test_prediction_does_not_depend_on_chunks(on_disk, big, schema, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(on_disk, schema, SMALL, out)
    in_chunks = predict(out, big.data)
    monkeypatch.setattr(scoring, "PREDICTION_ROWS", 10**6)
    whole = predict(out, big.data)
    assert in_chunks.drop("prediction").equals(whole.drop("prediction"))
    np.testing.assert_allclose(in_chunks["prediction"], whole["prediction"], rtol=1e-6)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_prediction_that_fails_late_leaves_nothing(on_disk, big, schema, tmp_path, saml_rec, ending):
    train(on_disk, schema, SMALL, tmp_path / "run")
    frame = pl.read_csv(big.data, infer_schema=False)
    frame.with_columns(country=pl.Series([*frame["country"][:-1], "xx"])).write_csv(big.data)
    out = tmp_path / f"scored.{ending}"
    result = saml_rec("predict", tmp_path / "run", "--data", big.data, "--out", out)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: scenario column 'country' has 'xx', not among the training rows")
    assert not list(tmp_path.glob("*scored*"))
    ok = saml_rec("predict", tmp_path / "run", "--data", tmp_path / "clicks.csv", "--out", out)
    assert ok.exit_code == 2


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_predictions_are_written_as_they_come(on_disk, big, schema, tmp_path, saml_rec, ending):
    train(on_disk, schema, SMALL, tmp_path / "run")
    out = tmp_path / f"scored.{ending}"
    assert saml_rec("predict", tmp_path / "run", "--data", big.data, "--out", out).exit_code == 0
    written = pl.read_csv(out, infer_schema=False) if ending == "csv" else pl.read_parquet(out)
    expected = predict(tmp_path / "run", big.data)
    assert written.columns == expected.columns
    np.testing.assert_array_equal(written["prediction"].cast(pl.Float64), expected["prediction"])
    assert written.drop("prediction").equals(expected.drop("prediction"))


def stopping(step, stop):
    steps = count(1)

    def stopped(self):
        if next(steps) == stop:
            raise KeyboardInterrupt
        step(self)

    return stopped


@pytest.mark.parametrize("stop", [1, 7, 16, 20])
def test_resuming_within_an_epoch_ends_with_the_same_bits(on_disk, in_memory, schema, tmp_path, stop):
    from saml_rec.training import loop
    from saml_rec.training.loop import CheckpointTimes

    for name, data in (("disk", on_disk), ("memory", in_memory)):
        whole = train(data, schema, SMALL, tmp_path / f"whole-{name}")
        out = tmp_path / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Optimizers, "step", stopping(loop.Optimizers.step, stop))
            with pytest.raises(KeyboardInterrupt):
                train(data, schema, SMALL, out, checkpoints=CheckpointTimes(steps=3))
        again = train(data, schema, SMALL, out, resume=True)
        assert again.metrics["overall"] == whole.metrics["overall"]
        assert [e["train_loss"] for e in again.history] == [e["train_loss"] for e in whole.history]
        saved = [torch.load(path / "model.pt")["weights"] for path in (out, tmp_path / f"whole-{name}")]
        assert all(torch.equal(saved[0][key], value) for key, value in saved[1].items())


def test_the_cache_is_used_and_named(on_disk, big, schema, tmp_path, monkeypatch):
    monkeypatch.setattr(stored.TableWriter, "add", lambda *_: pytest.fail("encoded again"))
    again = prepare(big.data, schema, seed=0, cache=tmp_path / "cache")
    assert again.encoder == on_disk.encoder
    assert again.tables["train"].fingerprint() == on_disk.tables["train"].fingerprint()


def test_other_inputs_have_other_caches(on_disk, big, schema, tmp_path):
    before = set((tmp_path / "cache" / "encoded").iterdir())
    prepare(big.data, schema, seed=1, cache=tmp_path / "cache")
    big.frame.with_columns(age=pl.col("age") + 1).write_csv(big.data)
    prepare(big.data, schema, seed=0, cache=tmp_path / "cache")
    directories = {path for path in (tmp_path / "cache" / "encoded").iterdir() if path.is_dir()}
    assert len(directories) == 3
    assert before < set((tmp_path / "cache" / "encoded").iterdir())


@pytest.mark.parametrize("damage", ["cut", "gone", "meta"])
def test_a_damaged_cache_is_made_anew(on_disk, big, schema, tmp_path, damage):
    (directory,) = (path for path in (tmp_path / "cache" / "encoded").iterdir() if path.is_dir())
    file = directory / ("meta.json" if damage == "meta" else "train-00003.arrow")
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-9])
    again = prepare(big.data, schema, seed=0, cache=tmp_path / "cache")
    assert again.tables["train"].whole().fingerprint() == on_disk.tables["train"].fingerprint()


def test_a_file_that_changes_while_it_is_read_is_refused(tiny, big, schema, tmp_path, monkeypatch):
    add = stored.TableWriter.add

    def change(self, rows):
        os.utime(big.data, (1, 1))
        add(self, rows)

    monkeypatch.setattr(stored.TableWriter, "add", change)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(big.data, schema, seed=0, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "encoded").iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written(tiny, big, schema, tmp_path):
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"cannot make the cache there: .*; see --cache"):
        prepare(big.data, schema, seed=0, cache=tmp_path / "cache")


CHILD = """
import sys
from saml_rec.data import preparation, prepare, readers, stored
from saml_rec.data.schema import load_schema
readers.CHUNK_ROWS, preparation.MEMORY_ROWS, stored.SHARD_ROWS = 150, 100, 2**16
data, schema, cache = sys.argv[1:]
print("ready", flush=True)
found = prepare(data, load_schema(schema), seed=0, cache=cache)
print(found.tables["train"].fingerprint(), flush=True)
"""


def finish(child):
    out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors.decode()
    return out.decode().strip()


def test_killed_at_random_moments_and_two_at_once(big, tmp_path, started):
    def start(cache):
        return started("-c", CHILD, big.data, big.schema, cache)

    draw = np.random.default_rng()
    cache = tmp_path / "cache"
    expected = finish(start(tmp_path / "other"))
    for _ in range(3):
        child = start(cache)
        time.sleep(draw.uniform(0, 0.4))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for path in (cache / "encoded").glob("*/meta.json") if cache.exists() else ():
            # Whatever has its name is whole, also to one who looks now.
            if path.parent.suffix != ".tmp":
                assert Cache(cache, path.parent.name).meta() is not None
    both = [start(cache) for _ in range(2)]
    assert [finish(child) for child in both] == [expected, expected]
    left = sorted(path.name for path in (cache / "encoded").iterdir())
    assert len(left) == 2
    assert left[1] == f"{left[0]}.lock"
    assert json.loads((cache / "encoded" / left[0] / "meta.json").read_text())["rows"] == ROWS


def test_rows_survive_being_joined_parted_and_taken(in_memory):
    whole = in_memory.tables["train"]
    cut = [whole.part(start, min(start + 123, len(whole))) for start in range(0, len(whole), 123)]
    assert joined(cut).fingerprint() == whole.fingerprint()
    chosen = torch.tensor([5, 0, 1599, 5])
    assert rows_of([whole.taken(chosen).batch(torch.arange(4))]) == rows_of([whole.batch(chosen)])
    assert tuple(in_memory.tables) == cells.SPLITS


def test_weights_and_groups_on_disk_are_those_in_memory(tiny, weighted_rows, tmp_path, monkeypatch):
    dataset = weighted_rows(ROWS)
    schema = load_schema(dataset.schema)
    with monkeypatch.context() as patch:
        patch.setattr(preparation_module, "MEMORY_ROWS", ROWS)
        in_memory = prepare(dataset.data, schema, seed=0)
    on_disk = prepare(dataset.data, schema, seed=0, cache=tmp_path / "cache")
    for name, expected in in_memory.tables.items():
        found = on_disk.tables[name]
        assert isinstance(found, stored.StoredTable)
        assert found.fingerprint() == expected.fingerprint() == found.whole().fingerprint()
        assert torch.equal(found.weight, expected.weight)
        assert torch.equal(found.group, expected.group)
        assert 0 < float(expected.weight.sum()) < 2 * len(expected)
    shuffled = on_disk.tables["train"].batches(96, generator=torch.Generator().manual_seed(0))
    assert sum(float(batch["weight"].sum()) for batch in shuffled) == float(in_memory.tables["train"].weight.sum())
    # Other columns in the same roles are other data.
    text = dataset.schema.read_text(encoding="utf-8")
    dataset.schema.write_text(text.replace('group = "user"', 'group = "item"'), encoding="utf-8")
    other = prepare(dataset.data, load_schema(dataset.schema), seed=0, cache=tmp_path / "cache")
    assert other.tables["test"].fingerprint() != on_disk.tables["test"].fingerprint()
    out = tmp_path / "run"
    metrics = train(on_disk, schema, SMALL, out, data_path=dataset.data).metrics
    assert metrics["overall"]["gauc_groups"] > 10
    assert evaluate(out)["overall"] == metrics["overall"]
    unlabelled = dataset.frame.drop("click", "importance").head(50)
    unlabelled.write_csv(tmp_path / "new.csv")
    assert predict(out, tmp_path / "new.csv")["prediction"].is_between(0, 1).all()


def test_a_table_without_weights_has_none(on_disk):
    assert on_disk.tables["test"].weight is None
    assert on_disk.tables["test"].group is None
