"""Whole models under torch.compile: in one graph, with every batch size sharing it."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.models import MODELS
from saml_rec.models.registry import is_fitted

M, V = 3, 9
SCHEMA = Schema(
    label="click",
    scenario="country",
    features=(
        FeatureSpec("user", "sparse", dim=3),
        FeatureSpec("item", "sparse", dim=4, scenario_aware=True),
        FeatureSpec("tags", "multi", dim=2, scenario_aware=True),
        FeatureSpec("age", "dense"),
        FeatureSpec("history", "sequence", item="item", heads=2),
    ),
)
NETWORKS = [name for name in MODELS if not is_fitted(name)]

QUICK = ("saml", "per_scenario")
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NETWORKS]
)


def build(name):
    torch.manual_seed(0)
    return MODELS[name](SCHEMA, M, vocabulary_sizes=dict.fromkeys(("user", "item", "tags"), V), hidden_dims=(6, 4))


def make_batch(rows):
    def ids(*shape):
        return torch.randint(V, shape)

    return {
        "scenario": torch.arange(rows) % M,
        "label": torch.randint(2, (rows,)).float(),
        "dense": torch.randn(rows, 2),
        "features": {"user": ids(rows), "item": ids(rows), "tags": ids(rows, 3), "history": ids(rows, 3)},
    }


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    # pytest records every level, and with it a record of each of the compiler's steps, which takes most of the time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "dynamic"])
@every_network
def test_a_model_compiles_whole_and_once(name, dynamic):
    model = build(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    for rows in (1, 2, 7, 33, 64, 100, 101, 102, 1000):
        compiled(make_batch(rows)).logit.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2


@every_network
def test_a_compiled_model_computes_what_it_does(name):
    model, twin, batch = build(name), build(name), make_batch(12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each, function in ((model, compiled), (twin, twin)):
        logit = function(batch).logit
        torch.nn.functional.binary_cross_entropy_with_logits(logit, batch["label"]).backward()
        each.logit = logit.detach()
    torch.testing.assert_close(model.logit, twin.logit)
    for (of, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda m, n=of: f"{n}: {m}")
