"""PLE's levels of experts: the formula with every gradient, who trains what."""

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close, backends, device_of, skip_unavailable

from saml_kernels.layers import ProgressiveExperts

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", backends("expert_outputs"))


def expert(towers, k, v):
    for weight, bias in zip(towers.weights, towers.biases, strict=True):
        v = torch.tanh(v @ weight[k] + bias[k])
    return v


def levels_by_hand(layer, x, scenario):
    """Every stream of every scenario at every level, one row after the other, as the paper draws it."""
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        streams, shared = [row] * M, row
        for level in layer.levels:
            n = layer.own_experts
            own = [[expert(level.own_experts, k * n + e, streams[k]) for e in range(n)] for k in range(M)]
            common = [expert(level.shared_experts, e, shared) for e in range(layer.shared_experts)]
            gates = [streams[k] @ level.gate.weights[0][k] + level.gate.biases[0][k] for k in range(M)]
            if level.shared_gate is not None:
                everything = torch.stack([*(e for experts in own for e in experts), *common])
                shared = torch.softmax(level.shared_gate(shared), 0) @ everything
            streams = [torch.softmax(gates[k], 0) @ torch.stack([*own[k], *common]) for k in range(M)]
        rows.append(streams[t])
    return torch.stack(rows)


CASES = {
    "one level": {"levels": ((6, 3),)},
    "one level, several experts": {"levels": ((4,),), "own_experts": 2, "shared_experts": 3},
    "two levels": {"levels": ((6, 3), (4,)), "shared_experts": 2},
    "two levels, several own": {"levels": ((3,), (4, 2)), "own_experts": 2},
    "three levels": {"levels": ((3,), (4, 2), (3,)), "own_experts": 2, "shared_experts": 2},
}


def build(backend="auto", **options):
    return ProgressiveExperts(M, D, **options, activation="tanh", backend=backend, dtype=torch.float64)


@on_every_backend
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_levels_are_the_formula_with_every_gradient(options, backend):
    device = device_of(backend)
    layer = randomised(build(backend, **options)).to(device)
    x, scenario = batch()

    def evaluate(function):
        leaf = x.to(device).requires_grad_()
        out = function(leaf)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        gradients = torch.autograd.grad(out, (leaf, *layer.parameters()), cotangent.to(device))
        names = ["out", "∂x", *(f"∂{name}" for name, _ in layer.named_parameters())]
        return dict(zip(names, [tensor.detach().cpu() for tensor in (out, *gradients)], strict=True))

    ref = evaluate(lambda x: levels_by_hand(layer, x, scenario))
    with skip_unavailable(backend):
        out = evaluate(lambda x: layer(x, scenario.to(device)))
    assert out["out"].shape == (B, options["levels"][-1][-1])
    assert_close(out, ref, TOLERANCE)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_gradcheck(options):
    layer = randomised(build("reference", **options))
    x, scenario = batch(rows=5)
    assert torch.autograd.gradcheck(lambda x: layer(x, scenario), (x.requires_grad_(),))


@pytest.mark.parametrize("own", range(M))
def test_at_the_last_level_rows_train_their_own_experts_the_shared_ones_and_their_gate(own):
    layer = build(levels=((4,), (3,)), own_experts=2)
    layer(batch()[0], torch.full((B,), own)).square().sum().backward()
    first, last = layer.levels
    for name, parameter in last.named_parameters():
        if name.startswith("shared"):
            assert parameter.grad.any(), name
            continue
        trained = parameter.grad.unflatten(0, (M, -1)).flatten(1).any(1)
        assert trained.tolist() == [k == own for k in range(M)], name
    # The shared stream of the first level reads every scenario's experts, g_t its own gate alone.
    assert all(parameter.grad[k].any() for parameter in first.own_experts.parameters() for k in range(2 * M))
    for parameter in first.gate.parameters():
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert all(parameter.grad.any() for parameter in first.shared_gate.parameters())


def test_foreign_experts_of_the_last_level_are_not_run():
    """Foreign parameters are not read: NaN in them shows nowhere, in output or gradients of x."""
    layer = build(levels=((4, 3),), own_experts=2)
    x, _ = batch()
    with torch.no_grad():
        for parameter in layer.levels[0].own_experts.parameters():
            parameter[:2] = torch.nan
    out = layer(x.requires_grad_(), torch.full((B,), 1))
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: ProgressiveExperts(0, D), "num_scenarios must be at least 1"),
        (lambda: ProgressiveExperts(M, D, own_experts=0), "own_experts must be at least 1"),
        (lambda: ProgressiveExperts(M, D, shared_experts=0), "shared_experts must be at least 1"),
        (lambda: ProgressiveExperts(M, D, ()), "levels must name at least one level"),
        (lambda: ProgressiveExperts(M, D, ((4,), ())), "level 2 of levels must name at least one layer"),
        (lambda: ProgressiveExperts(M, D, ((4, 0),)), "every width in level 1 of levels must be at least 1"),
        (lambda: ProgressiveExperts(M, D, activation="rellu"), "did you mean 'relu'"),
        (lambda: ProgressiveExperts(M, D)(torch.zeros(2, D + 1), torch.zeros(2).long()), "x must have shape"),
        (lambda: ProgressiveExperts(M, D)(torch.zeros(2, D), torch.zeros(3).long()), "scenario must have shape"),
        (lambda: ProgressiveExperts(M, D)(torch.zeros(1, D), torch.tensor([M])), r"must lie in \[0, 3\)"),
        (lambda: ProgressiveExperts(M, D)(torch.zeros(1, D), torch.tensor([-1])), r"must lie in \[0, 3\)"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
