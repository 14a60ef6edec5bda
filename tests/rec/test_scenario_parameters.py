"""Which parameters belong to single scenarios, and how fast these learn."""

import dataclasses
import math

import pytest
import torch

from saml_rec.data import prepare
from saml_rec.data.schema import FeatureSpec, Schema, load_schema
from saml_rec.errors import InputError
from saml_rec.models.registry import MODELS, is_fitted
from saml_rec.models.tables import TableOptions
from saml_rec.sealed import load
from saml_rec.training import TrainOptions, loop, train
from saml_rec.training.optimizers import Optimizers
from saml_rec.training.scenario_parameters import decaying, of_scenarios

M = 7
"""A size that nothing else has: a parameter whose first dimension is M belongs to scenarios."""
SCHEMA = Schema(
    label="click",
    scenario="country",
    features=(FeatureSpec("item", "sparse", dim=4, scenario_aware=True), FeatureSpec("age", "dense")),
)
NETWORKS = [name for name in MODELS if not is_fitted(name)]


def build(name, **options):
    return MODELS[name](SCHEMA, M, vocabulary_sizes={"item": 9}, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_scenarios_parameters_are_those_with_a_dimension_of_scenarios(name):
    model = build(name, **{"ple": {"shared_experts": 2, "hidden_dims": (6, 5)}}.get(name, {}))
    # A scenario's embedding is an input like another feature's.
    expected = {
        key for key, p in model.named_parameters() if p.shape[0] == M and not key.startswith("scenario_embedding")
    }
    assert set(of_scenarios(model)) == expected
    assert bool(expected) == (name not in ("mlp", "mlp_scenario"))
    biases = {key for key in expected if "bias" in key.rpartition("weight")[2]}
    assert bool(biases) == bool(expected)
    assert set(decaying(model)) == expected - biases


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_is_a_share_as_long(name, decay):
    """Adam's first step moves a parameter by its learning rate, whatever the gradient; decay follows it."""
    torch.manual_seed(0)
    model = build(name)
    optimizer = Optimizers(model, 0.01, decay, TableOptions(), scenario_rate=0.25)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    single = set(of_scenarios(model))
    for key, parameter in model.named_parameters():
        rate = 0.01 * (0.25 if key in single else 1)
        kept = before[key] - parameter.detach() - rate
        shrunk = before[key] * rate * decay
        assert torch.allclose(kept, shrunk, atol=1e-6) or torch.allclose(kept, torch.zeros(()), atol=1e-6), key


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("saml", {}, 1 / math.sqrt(3)),
        ("saml", {"branch_init": "independent"}, 1 / math.sqrt(3)),
        ("star", {}, 1.0),
        ("pepnet", {}, 1.0),
        ("mmoe", {}, 1.0),
        ("mlp", {}, 1.0),
    ],
)
def test_each_model_has_its_default(small_dataset, tmp_path, monkeypatch, model, options, expected):
    schema = load_schema(small_dataset.schema)
    data = prepare(small_dataset.data, schema, seed=0)
    seen = []

    class Watched(Optimizers):
        def __init__(self, *arguments):
            seen.append(arguments[4:])
            super().__init__(*arguments)

    monkeypatch.setattr(loop, "Optimizers", Watched)
    small = TrainOptions(model=model, epochs=1, model_options={"hidden_dims": (4,)} | options)
    train(data, schema, small, tmp_path / "default")
    given = dataclasses.replace(small, scenario_rate=0.5, scenario_decay=8.0)
    train(data, schema, given, tmp_path / "given")
    train(data, schema, dataclasses.replace(small, learning_rate=0.02), tmp_path / "fast")
    assert data.encoder.num_scenarios == 3
    # A step takes no more than a tenth, however fast.
    own = (100.0, 5.0) if model in ("saml", "pepnet") else (0.0, 0.0)
    assert seen == [
        (pytest.approx(expected), own[0], 3),
        (0.5, 8.0, 3),
        (pytest.approx(expected), own[1], 3),
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_pulls_scenarios_together(name):
    """The mean over scenarios is where AdamW put it, and every scenario keeps 1 − lr · decay of its distance to it."""
    torch.manual_seed(0)
    model, free = (build(name, **{"ple": {"own_experts": 2}}.get(name, {})) for _ in range(2))
    free.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    gradients = {key: torch.randn(p.shape, generator=generator) for key, p in model.named_parameters()}
    for each, decay in ((model, 30.0), (free, 0.0)):
        for key, parameter in each.named_parameters():
            parameter.grad = gradients[key].clone()
        Optimizers(each, 0.01, 0.5, TableOptions(), 0.25, decay, M).step()
    single = set(decaying(model))
    for (key, pulled), plain in zip(model.named_parameters(), free.parameters(), strict=True):
        if key not in single:
            assert torch.equal(pulled, plain), key
            continue
        experts = plain.shape[0] // M
        assert experts == (2 if ".own_experts." in key else 1), key
        for expert in range(experts):
            own = plain.detach()[expert::experts].double()
            expected = own.mean(0) + 0.7 * (own - own.mean(0))
            assert torch.allclose(pulled.detach()[expert::experts].double(), expected, atol=1e-6), key


def test_the_largest_decay_keeps_scenarios_alike(small_dataset, tmp_path):
    """SAML's branches start alike; only local tables may set scenarios apart then."""
    schema = load_schema(small_dataset.schema)
    data = prepare(small_dataset.data, schema, seed=0)
    for decay, alike in ((0.0, False), (1000.0, True)):
        options = TrainOptions(epochs=1, scenario_decay=decay, learning_rate=1e-3)
        train(data, schema, options, tmp_path / str(decay))
        weights = load(tmp_path / str(decay) / "checkpoint.pt", "checkpoint")["weights"]
        for start in ("trunk.branch_weights", "trunk.gate_weights", "head.weights"):
            own = [value for key, value in weights.items() if key.startswith(start)]
            assert own
            assert all(torch.allclose(each, each[:1], atol=1e-7) for each in own) == alike, start
        biases = weights["trunk.branch_biases.0"]
        assert not torch.allclose(biases, biases[:1], atol=1e-6)


@pytest.mark.parametrize("decay", [-1.0, 101.0, math.inf, math.nan])
def test_bad_decays(decay):
    with pytest.raises(
        InputError, match=f"^scenario_decay must be from 0 to 1 / learning_rate, here 100, .*, got {decay}$"
    ):
        TrainOptions(learning_rate=0.01, scenario_decay=decay)


def test_rate_zero_trains_what_is_shared_alone(small_dataset, tmp_path):
    schema = load_schema(small_dataset.schema)
    data = prepare(small_dataset.data, schema, seed=0)
    runs = {}
    for epochs in (1, 2):
        options = TrainOptions(epochs=epochs, patience=0, scenario_rate=0.0, model="shared_bottom")
        train(data, schema, options, tmp_path / str(epochs))
        runs[epochs] = load(tmp_path / str(epochs) / "checkpoint.pt", "checkpoint")["weights"]
    moved = {key.partition(".")[0] for key, value in runs[1].items() if not torch.equal(value, runs[2][key])}
    assert moved == {"features", "bottom"}
    assert any(key.startswith("towers") for key in runs[1])


@pytest.mark.parametrize("rate", [-0.1, math.inf, math.nan])
def test_bad_rates(rate):
    with pytest.raises(InputError, match=f"^scenario_rate must be at least 0 and finite, got {rate}$"):
        TrainOptions(scenario_rate=rate)
