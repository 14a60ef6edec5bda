"""Models that are fitted as a whole: what they compute, what they choose, how they are kept."""

import dataclasses
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saml_rec.data import prepare
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.models import LightGBM, LogisticRegression, lightgbm
from saml_rec.models.construction import build_model, parameter_count
from saml_rec.models.registry import MODELS, installed_models, is_fitted
from saml_rec.processes import Processes
from saml_rec.training import TrainOptions, train

FITTED = [name for name in MODELS if is_fitted(name)]


@pytest.fixture(scope="module")
def schema(small_dataset):
    return load_schema(small_dataset.schema)


@pytest.fixture(scope="module")
def data(small_dataset, schema):
    return prepare(small_dataset.data, schema, seed=0)


@pytest.fixture(scope="module")
def weighted(weighted_dataset):
    schema = load_schema(weighted_dataset.schema)
    return schema, prepare(weighted_dataset.data, schema, seed=0)


def fitted(name, data, schema, seed=0, **options):
    model = build_model(name, options, schema, data.encoder)
    return model, model.fit(data.tables["train"], data.tables["valid"], seed)


def all_rows(table):
    return next(iter(table.batches(len(table))))


@pytest.mark.parametrize("local_features", [False, True])
def test_logistic_regression_is_a_sum_of_weights(data, schema, local_features):
    model = build_model("logistic_regression", {"local_features": local_features}, schema, data.encoder)
    model.weight.copy_(torch.randn(len(model.weight), generator=torch.Generator().manual_seed(0)))
    batch = all_rows(data.tables["train"])
    sizes = data.encoder.vocabulary_sizes
    features = [*schema.of_kind("sparse"), *schema.of_kind("multi"), *schema.of_kind("sequence")]
    assert any(feature.scenario_aware for feature in features)
    logits = model(batch).logit
    for n in range(0, len(logits), 7):
        weights = iter(model.weight.tolist())

        def taken(count, weights=weights):
            return [next(weights) for _ in range(count)]

        expected = sum(w * x for w, x in zip(taken(batch["dense"].shape[1]), batch["dense"][n].tolist(), strict=True))
        own = int(batch["scenario"][n])
        expected += taken(data.encoder.num_scenarios)[own]
        for feature in features:
            size = sizes[feature.item or feature.name]
            ids = [i for i in batch["features"][feature.name][n].view(-1).tolist() if i != 0]
            tables = [taken(size)]
            if local_features and feature.scenario_aware:
                tables.append([taken(size) for _ in range(data.encoder.num_scenarios)][own])
            for table in tables:
                expected += sum(table[i] for i in ids) / max(len(ids), 1)
        (constant,) = weights
        assert logits[n].item() == pytest.approx(expected + constant, rel=1e-9)


@pytest.mark.parametrize("local_features", [False, True])
def test_logistic_regression_is_at_the_optimum(weighted, local_features):
    """The gradient of Σ w BCE + ‖weights‖² / (2 C), the constant not penalised, is zero."""
    schema, data = weighted
    c = 0.5
    model, report = fitted("logistic_regression", data, schema, inverse_penalties=(c,), local_features=local_features)
    assert report["inverse_penalty"] == c
    assert not report["is_at_end_of_grid"]
    batch = all_rows(data.tables["train"])
    model.weight.requires_grad_()
    losses = F.binary_cross_entropy_with_logits(
        model(batch).logit, batch["label"].double(), weight=batch["weight"].double(), reduction="sum"
    )
    (losses + model.weight[:-1].square().sum() / (2 * c)).backward()
    assert model.weight.grad.abs().max() < 0.01
    assert model.weight.detach().abs().max() > 0.1


def test_the_penalty_is_chosen_on_the_validation_rows(data, schema):
    grid = (0.001, 0.03, 0.3, 1000.0)
    model, report = fitted("logistic_regression", data, schema, inverse_penalties=grid)
    batch = all_rows(data.tables["valid"])
    alone = {}
    for c in grid:
        other, _ = fitted("logistic_regression", data, schema, inverse_penalties=(c,))
        alone[c] = other.loss(batch).item()
    assert [trial["inverse_penalty"] for trial in report["tried"]] == sorted(grid)
    for trial in report["tried"]:
        assert trial["valid_logloss"] == pytest.approx(alone[trial["inverse_penalty"]], rel=1e-3)
    best = min(alone, key=alone.get)
    assert report["inverse_penalty"] == best
    assert report["is_at_end_of_grid"] == (best in (min(grid), max(grid)))
    assert model.loss(batch).item() == pytest.approx(alone[best], rel=1e-3)


def test_the_end_of_the_grid_is_told(data, schema):
    _, report = fitted("logistic_regression", data, schema, inverse_penalties=(1e-6, 1e-5))
    assert report["is_at_end_of_grid"]


def test_a_row_of_weight_w_counts_as_w_rows(weighted):
    """Weights are multiples of ½: twice as many rows, and a penalty that stands against twice the loss."""
    schema, data = weighted
    model, _ = fitted("logistic_regression", data, schema, inverse_penalties=(0.5,))
    table = data.tables["train"]
    repeated = table.taken(torch.repeat_interleave(torch.arange(len(table)), (2 * table.weight).long()))
    tables = data.tables | {"train": _unweighted(repeated)}
    without = dataclasses.replace(schema, weight=None)
    other, _ = fitted(
        "logistic_regression", dataclasses.replace(data, tables=tables), without, inverse_penalties=(0.25,)
    )
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-3, atol=1e-4)


def test_trees_follow_the_weights(weighted):
    schema, data = weighted
    without = dataclasses.replace(data, tables={name: _unweighted(table) for name, table in data.tables.items()})
    model, _ = fitted("lightgbm", data, schema)
    other, _ = fitted("lightgbm", without, dataclasses.replace(schema, weight=None))
    batch = all_rows(data.tables["train"])
    assert not torch.equal(other(batch).logit, model(batch).logit)


def _unweighted(table):
    return dataclasses.replace(table, weight=None)


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_model_is_kept_in_its_state_dict(data, schema, name):
    model, _ = fitted(name, data, schema)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build_model(name, {}, schema, data.encoder)
    other.load_state_dict(torch.load(file, weights_only=True))
    batch = all_rows(data.tables["test"])
    assert torch.equal(other(batch).logit, model(batch).logit)
    assert model(batch).logit.dtype == torch.float64
    assert parameter_count(other) == parameter_count(model) > 10
    assert model(batch).logit.std() > 0.1


def test_lightgbm_is_the_booster_on_its_columns(data, schema):
    import lightgbm as library

    model, report = fitted("lightgbm", data, schema, seed=3, num_trees=40, num_leaves=5, tree_rate=0.1)
    booster = library.Booster(model_str=model.booster.numpy().tobytes().decode())
    assert booster.num_trees() == report["trees"] <= 40
    batch = all_rows(data.tables["test"])
    columns = model.columns(batch)
    assert columns.shape == (len(batch["label"]), booster.num_feature())
    np.testing.assert_allclose(model(batch).logit, booster.predict(columns, raw_score=True))
    np.testing.assert_array_equal(columns[:, 0], batch["scenario"])
    assert all(tree["num_leaves"] <= 5 for tree in booster.dump_model()["tree_info"])
    again, _ = fitted("lightgbm", data, schema, seed=3, num_trees=40, num_leaves=5, tree_rate=0.1)
    assert torch.equal(again.booster, model.booster)


def test_lists_of_many_values_are_counted(data, schema, monkeypatch):
    (feature, *_) = schema.of_kind("multi")
    batch = all_rows(data.tables["train"])
    whole = build_model("lightgbm", {}, schema, data.encoder).columns(batch).shape[1]
    monkeypatch.setattr(lightgbm, "MOST_VALUES", 2)
    model, _ = fitted("lightgbm", data, schema)
    columns = model.columns(batch)
    assert columns.shape[1] < whole
    ids = batch["features"][feature.name]
    lengths = (ids != 0).sum(1)
    last = [row[length - 1].item() if length else 0 for row, length in zip(ids, lengths, strict=True)]
    assert any((column == np.array(last)).all() for column in columns.T)
    assert any((column == lengths.numpy()).all() for column in columns.T)


def test_without_the_extra_lightgbm_says_what_to_install(data, schema, monkeypatch):
    monkeypatch.setattr(lightgbm, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"^model lightgbm: LightGBM is not installed; pip install 'saml-kernels\[lightg"
    ):
        build_model("lightgbm", {}, schema, data.encoder)
    assert "lightgbm" not in installed_models()
    assert set(installed_models()) == set(MODELS) - {"lightgbm"}


@pytest.mark.parametrize("name", FITTED)
def test_one_label_is_refused(data, schema, name):
    table = data.tables["train"]
    one = table.taken((table.label == 1).nonzero().squeeze(1))
    model = build_model(name, {}, schema, data.encoder)
    with pytest.raises(
        InputError, match=rf"^model {name} needs training rows of both labels, got {len(one)} rows of one"
    ):
        model.fit(one, data.tables["valid"], 0)


def test_a_choice_needs_validation_rows(data, schema):
    nothing = data.tables["valid"].part(0, 0)
    model = build_model("logistic_regression", {}, schema, data.encoder)
    with pytest.raises(InputError, match="chooses on validation rows, and there are none; give it one C"):
        model.fit(data.tables["train"], nothing, 0)
    one = build_model("logistic_regression", {"inverse_penalties": (0.1,)}, schema, data.encoder)
    assert one.fit(data.tables["train"], nothing, 0)["inverse_penalty"] == 0.1
    trees = build_model("lightgbm", {"num_trees": 7}, schema, data.encoder)
    assert trees.fit(data.tables["train"], nothing, 0) == {"trees": 7, "is_at_most_trees": True}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("logistic_regression", {"inverse_penalties": ()}, "inverse_penalties must be positive and finite"),
        ("logistic_regression", {"inverse_penalties": (1.0, 0.0)}, "inverse_penalties must be positive and finite"),
        ("lightgbm", {"num_trees": 0}, "num_trees must be at least 1, got 0"),
        ("lightgbm", {"num_leaves": 1}, "num_leaves must be at least 2, got 1"),
        ("lightgbm", {"tree_rate": 0.0}, r"tree_rate must be above 0 and finite, got 0\.0"),
    ],
)
def test_bad_options(data, schema, name, options, message):
    with pytest.raises(InputError, match=message):
        build_model(name, options, schema, data.encoder)


@pytest.mark.parametrize("name", FITTED)
def test_a_finished_fit_is_not_repeated(data, schema, name, tmp_path):
    options = TrainOptions(model=name)
    first = train(data, schema, options, tmp_path)
    again = train(data, schema, options, tmp_path, resume=True)
    assert again.already_finished
    assert again.metrics == first.metrics
    assert first.metrics["fitted"] == first.history[0]["fitted"]


@pytest.mark.parametrize("name", FITTED)
def test_several_processes_are_refused(name):
    several = Processes(rank=0, count=2)
    with pytest.raises(InputError, match=f"^model {name} is fitted in one process, not in 2$"):
        TrainOptions(model=name, device="cpu").resolved(several)


def test_public_names():
    assert MODELS["logistic_regression"] is LogisticRegression
    assert MODELS["lightgbm"] is LightGBM
