"""The engines of embedding tables: the same look-ups and weights, updates by their formulas, rows apart untouched."""

import dataclasses
import importlib.util

import pytest
import torch

from saml_rec.data import prepare
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import load_trained
from saml_rec.models import tables
from saml_rec.models.features import ScenarioAwareEmbedding
from saml_rec.models.tables import ENGINES, EPSILON, TableOptions, make_table, resolve_engine, table_options
from saml_rec.training import TrainOptions, train
from saml_rec.training.optimizers import Optimizers

needs_fbgemm = pytest.mark.skipif(importlib.util.find_spec("fbgemm_gpu") is None, reason="fbgemm is not installed")
ENGINE = [pytest.param(name, marks=needs_fbgemm if name == "fbgemm" else ()) for name in ENGINES if name != "torchrec"]
LAZY = ENGINE[1:]
ROWS, DIM = 12, 8
READ = torch.tensor([[3, 0, 5], [3, 3, 11], [0, 7, 5]])
CPU = torch.device("cpu")
ADAGRAD = "rowwise_adagrad"


def table_of(engine, **options):
    """A table with known rows; row 0 is zero."""
    with table_options(TableOptions(engine, **options)):
        table = make_table(ROWS, DIM)
    weight = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    table.rows.copy_(weight)
    return table


@pytest.mark.parametrize("engine", ENGINE)
def test_look_up(engine):
    table = table_of(engine)
    found = table.look_up(READ)
    assert found.shape == (3, 3, DIM)
    assert torch.equal(found, table.rows[READ])
    assert not found[READ == 0].any()
    assert table.look_up(torch.zeros(2, 1, dtype=torch.int64)).shape == (2, 1, DIM)


@pytest.mark.parametrize("engine", ENGINE)
def test_a_row_that_is_not_there(engine):
    with pytest.raises((IndexError, RuntimeError)):
        table_of(engine).look_up(torch.tensor([[ROWS]]))


@pytest.mark.parametrize("engine", LAZY)
def test_row_wise_adagrad_in_float64(engine):
    """Three steps; a row that is read twice has the sum of both gradients. Other rows keep their bits, padding too."""
    table = table_of(engine, learning_rate=0.1)
    optimizers = Optimizers(
        torch.nn.ModuleDict({"table": table, "network": torch.nn.Linear(2, 2)}),
        0.1,
        0.5,
        TableOptions(engine, learning_rate=0.1),
    )
    before = table.rows.clone()
    exact, squares = before.double(), torch.zeros(ROWS, dtype=torch.float64)
    target = torch.randn(3, 3, DIM, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizers.zero_grad()
        (table.look_up(READ) - target).square().sum().backward()
        optimizers.step()
        gradient = torch.zeros(ROWS, DIM, dtype=torch.float64)
        gradient.index_add_(0, READ.flatten(), (2 * (exact[READ] - target)).view(-1, DIM))
        gradient[0] = 0
        squares += gradient.square().mean(1)
        exact -= 0.1 * gradient / (squares.sqrt() + EPSILON).unsqueeze(1)
    torch.testing.assert_close(table.rows.double(), exact, rtol=1e-5, atol=1e-6)
    untouched = [row for row in range(ROWS) if row not in READ.flatten().tolist() or row == 0]
    assert torch.equal(table.rows[untouched], before[untouched])


def test_adam_of_sparse_tables_is_that_of_a_dense_one_where_every_row_is_read():
    options = TableOptions("sparse", "adam", 0.1)
    table, dense = table_of("sparse", optimizer="adam", learning_rate=0.1), table_of("dense")
    optimizers = Optimizers(torch.nn.ModuleDict({"table": table, "network": torch.nn.Linear(2, 2)}), 0.1, 0.5, options)
    expected = torch.optim.Adam(dense.parameters(), lr=0.1)
    every = torch.arange(1, ROWS)
    for _ in range(3):
        for each, step in ((table, optimizers), (dense, expected)):
            step.zero_grad()
            (each.look_up(every) - 5).square().sum().backward()
            step.step()
    torch.testing.assert_close(table.rows, dense.rows)


@pytest.mark.parametrize("engine", ENGINE)
@pytest.mark.parametrize("other", ENGINE)
def test_weights_of_any_engine_are_loaded_by_any_other(engine, other):
    with table_options(TableOptions(engine)):
        first = ScenarioAwareEmbedding(3, 5, DIM, True)
    with table_options(TableOptions(other)):
        second = ScenarioAwareEmbedding(3, 5, DIM, True)
    second.load_state_dict(first.state_dict())
    ids, scenario = torch.tensor([[1, 4], [0, 2]]), torch.tensor([2, 0])
    for here, there in zip(first(ids, scenario), second(ids, scenario), strict=True):
        assert torch.equal(here, there)


@needs_fbgemm
def test_weights_that_do_not_fit_fbgemm_are_refused():
    table = table_of("fbgemm")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        table.load_state_dict({"weight": torch.zeros(ROWS + 1, DIM)})
    with pytest.raises(RuntimeError, match="Missing key"):
        table.load_state_dict({})


def test_auto_follows_the_rows_the_device_and_what_is_installed(monkeypatch):
    monkeypatch.setattr(tables, "has_fbgemm", lambda: True)
    assert resolve_engine("auto", ADAGRAD, tables.DENSE_ROWS, CPU) == "dense"
    assert resolve_engine("auto", ADAGRAD, tables.DENSE_ROWS + 1, CPU) == "fbgemm"
    assert resolve_engine("auto", "adam", tables.DENSE_ROWS + 1, CPU) == "sparse"
    assert resolve_engine("auto", ADAGRAD, tables.DENSE_ROWS + 1, torch.device("cuda")) == "sparse"
    assert resolve_engine("dense", ADAGRAD, 10**9, CPU) == "dense"
    with pytest.raises(InputError, match="got device cuda; take sparse"):
        resolve_engine("fbgemm", ADAGRAD, 1, torch.device("cuda"))
    monkeypatch.setattr(tables, "has_fbgemm", lambda: False)
    assert resolve_engine("auto", ADAGRAD, tables.DENSE_ROWS + 1, CPU) == "sparse"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": "ram"}, "table engine must be one of dense, sparse, fbgemm, torchrec, got 'ram'"),
        ({"table_optimizer": "sgd"}, "table optimizer must be one of rowwise_adagrad, adam, got 'sgd'"),
        ({"table_learning_rate": 0.0}, "table learning rate must be above 0 and finite, got 0.0"),
        ({"tables": "fbgemm", "table_optimizer": "adam"}, "trained by rowwise_adagrad, got 'adam'"),
    ],
    ids=str,
)
def test_bad_options_are_refused_before_any_work(options, message):
    with pytest.raises(InputError, match=message):
        TrainOptions(**options)


def test_without_fbgemm_the_message_names_the_line_to_install_it(monkeypatch):
    monkeypatch.setattr(tables, "has_fbgemm", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'fbgemm-gpu-cpu>=1\.8'"):
        TrainOptions(tables="fbgemm")


SMALL = TrainOptions(epochs=2, batch_size=64, patience=0, model_options={"hidden_dims": (8, 4)})


@pytest.mark.parametrize("engine", ENGINE)
def test_a_run_says_its_engine_resumes_to_the_same_bits_and_is_read_without_it(
    small_dataset, tmp_path, train_one_epoch, engine
):
    schema = load_schema(small_dataset.schema)
    data = prepare(small_dataset.data, schema, seed=SMALL.seed)
    options = dataclasses.replace(SMALL, tables=engine)
    whole = train(data, schema, options, tmp_path / "whole")
    trained_by = "adamw" if engine == "dense" else "rowwise_adagrad with learning rate 0.02"
    assert whole.metrics["tables"] == {"engine": engine, "trained_by": trained_by}

    train_one_epoch(data, schema, options, tmp_path / "stopped")
    resumed = train(data, schema, options, tmp_path / "stopped", resume=True)
    assert resumed.metrics["overall"] == whole.metrics["overall"]
    first, second = (load_trained(tmp_path / name, device="cpu").model.state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.metrics["parameters"] == sum(weight.numel() for weight in first.values())


@needs_fbgemm
def test_a_run_goes_on_in_another_engine_with_the_same_optimizer(small_dataset, tmp_path, monkeypatch, train_one_epoch):
    schema = load_schema(small_dataset.schema)
    data = prepare(small_dataset.data, schema, seed=SMALL.seed)
    monkeypatch.setattr(tables, "DENSE_ROWS", 0)
    whole = train(data, schema, SMALL, tmp_path / "whole")
    assert whole.metrics["tables"]["engine"] == "fbgemm"
    out = train_one_epoch(data, schema, SMALL, tmp_path / "out")
    monkeypatch.setattr(tables, "has_fbgemm", lambda: False)
    again = train(data, schema, SMALL, out, resume=True)
    assert again.metrics["tables"]["engine"] == "sparse"
    assert again.history[-1]["train_loss"] == pytest.approx(whole.history[-1]["train_loss"], rel=1e-5)
    monkeypatch.setattr(tables, "DENSE_ROWS", 10**6)
    with pytest.raises(InputError, match="cannot resume, tables changed: dense was False, is True"):
        train(data, schema, SMALL, out, resume=True)
