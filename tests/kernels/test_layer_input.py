"""Layers for many scenarios: input that is refused, and autocast."""

import pytest
import torch
from layer_batches import D, M, batch
from problems import assert_close

from saml_kernels.layers import (
    STARMLP,
    GatedTowers,
    GateUnit,
    MixtureOfExperts,
    PartitionedNorm,
    ProgressiveExperts,
    ScoreMixture,
)

pytestmark = pytest.mark.cpu


def test_layers_run_under_autocast():
    x, scenario = batch()
    x = x.float()
    layers = {
        "norm": PartitionedNorm(M, D),
        "star": STARMLP(M, D, (4, 1)),
        "mixture": ScoreMixture(M, D, (4,)),
        "experts": MixtureOfExperts(2, D, (4,), M),
        "progressive": ProgressiveExperts(M, D, ((4,), (3,), (2,)), 2),
    }
    for name, layer in layers.items():
        expected = layer.eval()(x, scenario).detach()
        with torch.autocast("cpu", torch.bfloat16):
            # As a product before the layer would leave it.
            out = layer(x.bfloat16(), scenario)
        assert_close({name: out.float()}, {name: expected}, 0.03)


def test_layers_with_two_inputs_run_under_autocast():
    """What the layer casts, and what its caller did not: x from a product before it, priors and features in float32."""
    (x, scenario), (other, _) = batch(), batch(1)
    x, other = x.float(), other.float()
    bottom, mixture = MixtureOfExperts(2, D, (4,), M), ScoreMixture(M, 4, (4,), weight_dim=D)
    gate, towers = GateUnit(D, 4, D, M), GatedTowers(M, D, D, (4, 1), 3)
    functions = {
        "hmoe": lambda x: mixture(bottom.views(x, scenario), scenario, weight_input=other),
        "gate": lambda x: gate(other, x, scenario),
        "gated towers": lambda x: towers(x, other, scenario),
    }
    for name, function in functions.items():
        expected = function(x).detach()
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x.bfloat16())
        assert_close({name: out.float()}, {name: expected}, 0.03)
        out.float().sum().backward()
    for layer in (bottom, mixture, gate, towers):
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: STARMLP(0, D, (4,)), ValueError, "num_scenarios must be at least 1"),
        (lambda: STARMLP(M, D, ()), ValueError, "hidden_dims must name at least one layer"),
        (lambda: STARMLP(M, D, (4,), "rellu"), ValueError, "did you mean 'relu'"),
        (lambda: PartitionedNorm(M, 0), ValueError, "dim must be at least 1"),
        (lambda: PartitionedNorm(M, D, eps=0), ValueError, "eps must be finite and above 0"),
        (lambda: PartitionedNorm(M, D, momentum=1.5), ValueError, "momentum must be at most 1"),
        (lambda: PartitionedNorm(M, D, combine="add"), ValueError, "combine must be one of"),
        (lambda: ScoreMixture(M, D, foreign_dtype=torch.float16), ValueError, "foreign_dtype must be None or one of"),
        (lambda: MixtureOfExperts(0, D), ValueError, "num_experts must be at least 1"),
        (lambda: MixtureOfExperts(2, D)(torch.zeros(1, D), torch.zeros(1)), ValueError, "there is one gate"),
        (lambda: MixtureOfExperts(2, D, num_scenarios=M)(torch.zeros(1, D)), ValueError, "the scenario of every row"),
        (lambda: PartitionedNorm(M, D)(torch.zeros(2, 4), torch.zeros(2).long()), ValueError, "z must have shape"),
        (lambda: PartitionedNorm(M, D)(torch.zeros(1, D), torch.tensor([M])), ValueError, r"must lie in \[0, 3\)"),
        (
            lambda: PartitionedNorm(M, D)(torch.zeros(1, D), torch.zeros(1)),
            TypeError,
            "scenario must be int32 or int64",
        ),
    ],
)
def test_bad_input(make, error, told):
    with pytest.raises(error, match=told):
        make()
