"""PEPNet's gate unit and gated towers: formulas with every gradient, what is under stop-gradient, who trains what."""

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close, backends, device_of, skip_unavailable

from saml_kernels.layers import GatedTowers, GateUnit

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", backends("grouped_mlp"))
P = 4


def priors(seed=5):
    return torch.randn(B, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate_by_hand(unit, prior, gated, t):
    """Of one row."""
    (w, v), (b, c) = ([tensor[t] for tensor in tensors] for tensors in (unit.network.weights, unit.network.biases))
    hidden = (prior @ w + b).clamp(min=0)
    return unit.scale / (1 + torch.exp(-(hidden @ v + c))) * gated


def towers_by_hand(layer, x, prior, scenario):
    (w,), (b,), width = layer.gate_inputs.weights, layer.gate_inputs.biases, layer.gate_dim
    rows = []
    for h, p, t in zip(x, prior, scenario.tolist(), strict=True):
        knowledge = torch.cat([p, h.detach()])
        last = len(layer.gate_outputs) - 1
        for index, gate in enumerate(layer.gate_outputs):
            own = slice(index * width, (index + 1) * width)
            hidden = (knowledge @ w[t][:, own] + b[t][own]).clamp(min=0)
            h = layer.scale / (1 + torch.exp(-(hidden @ gate.weights[0][t] + gate.biases[0][t]))) * h
            h = h @ layer.towers.weights[index][t] + layer.towers.biases[index][t]
            h = h if index == last else torch.tanh(h)
        rows.append(h)
    return torch.stack(rows)


def evaluate(function, inputs, parameters, device="cpu"):
    """Output, and gradients of inputs and parameters, under one cotangent."""
    leaves = [each.to(device).clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(device)
    gradients = torch.autograd.grad(out, (*leaves, *parameters), cotangent)
    return {str(i): tensor.detach().cpu() for i, tensor in enumerate((out, *gradients))}


@on_every_backend
@pytest.mark.parametrize("scenarios", [None, M])
def test_gate_unit_is_the_formula_with_every_gradient(scenarios, backend):
    device = device_of(backend)
    unit = randomised(GateUnit(P, 6, D, scenarios, scale=1.5, backend=backend, dtype=torch.float64)).to(device)
    x, scenario = batch()
    ids = torch.zeros(B, dtype=torch.int64) if scenarios is None else scenario

    def by_hand(prior, gated):
        return torch.stack([gate_by_hand(unit, p, g, t) for p, g, t in zip(prior, gated, ids.tolist(), strict=True)])

    given = () if scenarios is None else (scenario.to(device),)
    ref = evaluate(by_hand, (priors(), x), tuple(unit.parameters()), device)
    with skip_unavailable(backend):
        out = evaluate(lambda prior, gated: unit(prior, gated, *given), (priors(), x), tuple(unit.parameters()), device)
    assert_close(out, ref, TOLERANCE)


@on_every_backend
def test_gated_towers_are_the_formula_with_every_gradient(backend):
    device = device_of(backend)
    layer = GatedTowers(M, D, P, (6, 3, 2), 4, "tanh", "identity", scale=3.0, backend=backend, dtype=torch.float64)
    randomised(layer).to(device)
    x, scenario = batch()
    inputs, parameters, ids = (x, priors()), tuple(layer.parameters()), scenario.to(device)
    ref = evaluate(lambda x, prior: towers_by_hand(layer, x, prior, scenario), inputs, parameters, device)
    with skip_unavailable(backend):
        out = evaluate(lambda x, prior: layer(x, prior, ids), inputs, parameters, device)
    assert_close(out, ref, TOLERANCE)


def test_gradcheck_of_gated_towers():
    """Numeric differences see the whole of x: they agree where x is no input of a gate, and the prior always."""
    layer = randomised(GatedTowers(M, D, P, (3, 1), 2, "tanh", "identity", backend="reference", dtype=torch.float64))
    x, scenario = batch(rows=6)
    prior = priors()[:6].requires_grad_()
    assert torch.autograd.gradcheck(lambda prior: layer(x, prior, scenario), (prior,))
    with torch.no_grad():
        layer.gate_inputs.weights[0][:, P:] = 0
    assert torch.autograd.gradcheck(lambda x: layer(x, prior.detach(), scenario), (x.requires_grad_(),))


def test_x_gets_no_gradient_through_the_gates():
    """With a first gate that is closed nothing is left of x but what gates read."""
    layer = GatedTowers(M, D, P, (3, 1), 2, "tanh", dtype=torch.float64)
    with torch.no_grad():
        layer.gate_outputs[0].weights[0].zero_()
        layer.gate_outputs[0].biases[0].fill_(-torch.inf)
    x, scenario = batch()
    x.requires_grad_()
    prior = priors().requires_grad_()
    out = layer(x, prior, scenario)
    out.sum().backward()
    assert not x.grad.any()
    assert prior.grad.any()
    assert not torch.equal(layer(x + 1, prior, scenario), out)


@pytest.mark.parametrize("own", range(M))
def test_rows_train_their_own_towers_and_gates(own):
    layer = GatedTowers(M, D, P, (4, 1), 3, "tanh", dtype=torch.float64)
    layer(batch()[0], priors(), torch.full((B,), own)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)], name


def test_a_gate_lies_between_zero_and_its_scale():
    unit = GateUnit(P, 6, D, scale=2.0, dtype=torch.float64)
    ones = torch.ones(B, D, dtype=torch.float64)
    gate = unit(priors(), ones)
    assert 0 < gate.min() < gate.max() < 2
    with torch.no_grad():
        unit.network.biases[1].fill_(torch.inf)
    assert torch.equal(unit(priors(), ones), 2 * ones)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: GateUnit(P, 0, D), "hidden_dim must be at least 1"),
        (lambda: GateUnit(P, 2, D, scale=0.0), "scale must be finite and above 0"),
        (lambda: GateUnit(P, 2, D, num_scenarios=0), "num_scenarios must be at least 1"),
        (lambda: GateUnit(P, 2, D)(torch.zeros(2, P + 1), torch.zeros(2, D)), r"prior must have shape \(B, 4\)"),
        (lambda: GateUnit(P, 2, D)(torch.zeros(2, P), torch.zeros(1, D)), r"gated must have shape \(2, 5\)"),
        (lambda: GateUnit(P, 2, D)(torch.zeros(2, P), torch.zeros(2, D), torch.zeros(2).long()), "there is one gate"),
        (lambda: GateUnit(P, 2, D, M)(torch.zeros(2, P), torch.zeros(2, D)), "the scenario of every row"),
        (lambda: GatedTowers(M, D, P, (), 2), "hidden_dims must name at least one layer"),
        (lambda: GatedTowers(M, D, P, (3,), 0), "gate_dim must be at least 1"),
        (lambda: GatedTowers(M, D, P, (3,), 2, "rellu"), "did you mean 'relu'"),
        (lambda: GatedTowers(M, D, P, (3,), 2)(torch.zeros(2, P), torch.zeros(2, P), torch.zeros(2)), "x must have"),
        (lambda: GatedTowers(M, D, P, (3,), 2)(torch.zeros(2, D), torch.zeros(2, D), torch.zeros(2)), "prior must"),
        (
            lambda: GatedTowers(M, D, P, (3,), 2)(torch.zeros(1, D), torch.zeros(1, P), torch.tensor([M])),
            r"must lie in \[0, 3\)",
        ),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
