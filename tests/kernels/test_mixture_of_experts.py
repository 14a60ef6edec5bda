"""Mixtures of experts: the formula, and the views under every scenario's gate."""

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close, backends, device_of, skip_unavailable

from saml_kernels.layers import MixtureOfExperts

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", backends("expert_outputs"))
K = 4


def experts_by_hand(layer, row):
    """(K, d_L) of one row."""
    outputs = []
    for k in range(K):
        v = row
        for weight, bias in zip(layer.weights, layer.biases, strict=True):
            v = (v @ weight[k] + bias[k, 0]).relu()
        outputs.append(v)
    return torch.stack(outputs)


def gate_by_hand(layer, row, t):
    if layer.num_scenarios is None:
        return torch.softmax(layer.gate.weight @ row + layer.gate.bias, 0)
    return torch.softmax(row @ layer.gate.weights[0][t] + layer.gate.biases[0][t], 0)


def mixture_by_hand(layer, x, scenario):
    rows = zip(x, scenario.tolist(), strict=True)
    return torch.stack([gate_by_hand(layer, row, t) @ experts_by_hand(layer, row) for row, t in rows])


def views_by_hand(layer, x, scenario):
    def view(row, j, t):
        h = gate_by_hand(layer, row, j) @ experts_by_hand(layer, row)
        return h if j == t else h.detach()

    rows = zip(x, scenario.tolist(), strict=True)
    return torch.stack([torch.stack([view(row, j, t) for j in range(M)]) for row, t in rows])


def evaluate(layer, function, x):
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad(out, (leaf, *layer.parameters()), cotangent.to(out.device))
    return {str(i): tensor.detach().cpu() for i, tensor in enumerate((out, *gradients))}


@on_every_backend
@pytest.mark.parametrize("scenarios", [None, M])
def test_mixture_of_experts_is_the_formula_with_every_gradient(scenarios, backend):
    device = device_of(backend)
    layer = randomised(MixtureOfExperts(K, D, (6, 2), scenarios, backend=backend, dtype=torch.float64)).to(device)
    x, scenario = (each.to(device) for each in batch())
    given = () if scenarios is None else (scenario,)
    ref = evaluate(layer, lambda x: mixture_by_hand(layer, x, scenario), x)
    with skip_unavailable(backend):
        assert_close(evaluate(layer, lambda x: layer(x, *given), x), ref, TOLERANCE)


@on_every_backend
def test_views_are_the_formula_with_every_gradient(backend):
    device = device_of(backend)
    layer = randomised(MixtureOfExperts(K, D, (6, 2), M, backend=backend, dtype=torch.float64)).to(device)
    x, scenario = (each.to(device) for each in batch())
    ref = evaluate(layer, lambda x: views_by_hand(layer, x, scenario), x)
    with skip_unavailable(backend):
        assert_close(evaluate(layer, lambda x: layer.views(x, scenario), x), ref, TOLERANCE)
        own = layer.views(x, scenario)[torch.arange(B), scenario]
        assert_close({"own": own}, {"own": layer(x, scenario)}, TOLERANCE)


def test_foreign_views_are_constants_and_leave_no_graph():
    layer = MixtureOfExperts(K, D, (6, 2), M, dtype=torch.float64)
    x, scenario = batch()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        views = layer.views(x.requires_grad_(), scenario)
    assert not any(shape[:2] == (B, M) for shape in shapes), "something of all M views is kept for backward"
    foreign = torch.ones(B, M, 1, dtype=torch.float64)
    foreign[torch.arange(B), scenario] = 0
    gradients = torch.autograd.grad((views * foreign).sum(), (x, *layer.parameters()))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("own", range(M))
def test_rows_train_all_experts_and_their_own_gate(own):
    layer = MixtureOfExperts(K, D, (6, 2), M, "tanh", dtype=torch.float64)
    layer(batch()[0], torch.full((B,), own)).square().sum().backward()
    for parameter in layer.gate.parameters():
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert all(parameter.grad[k].any() for parameter in (*layer.weights, *layer.biases) for k in range(K))


def test_gradcheck():
    layer = randomised(MixtureOfExperts(K, D, (3, 2), M, "tanh", backend="reference", dtype=torch.float64))
    x, scenario = batch(rows=5)
    assert torch.autograd.gradcheck(lambda x: layer(x, scenario), (x.requires_grad_(),))


def test_views_need_a_gate_for_each_scenario():
    with pytest.raises(ValueError, match="views need a gate per scenario"):
        MixtureOfExperts(K, D).views(torch.zeros(1, D), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\)"):
        MixtureOfExperts(K, D, num_scenarios=M).views(torch.zeros(1, D), torch.tensor([M]))
