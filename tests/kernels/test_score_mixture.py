"""HMoE's mixture of scores: the formula, who trains what, and with views of experts under every scenario's gate."""

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close, backends, device_of, skip_unavailable

from saml_kernels.layers import MixtureOfExperts, ScoreMixture

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", backends("branch_scores"))
W = 4


def network_by_hand(networks, j, v):
    last = len(networks.weights) - 1
    for index, (weight, bias) in enumerate(zip(networks.weights, networks.biases, strict=True)):
        v = v @ weight[j] + bias[j]
        v = v if index == last else v.relu()
    return v


def mixture_by_hand(layer, x, scenario, weight_input=None):
    rows = []
    for n, t in enumerate(scenario.tolist()):
        read = x[n] if weight_input is None else weight_input[n]
        (weight,), (bias,) = layer.weight_networks.weights, layer.weight_networks.biases
        weights = torch.softmax(read @ weight[t] + bias[t], 0)
        total = 0
        for j in range(M):
            v = network_by_hand(layer.networks, j, x[n] if x.dim() == 2 else x[n, j])
            total = total + weights[j] * torch.sigmoid(v if j == t else v.detach())
        rows.append(torch.logit(total).squeeze())
    return torch.stack(rows)


def hmoe_by_hand(bottom, mixture, x, scenario):
    """H_t(x) with S_j(x) = sigmoid(network_j(h_j(x))), as the paper writes it, from a row's x alone."""
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        experts = []
        for e in range(bottom.num_experts):
            v = row
            for weight, bias in zip(bottom.weights, bottom.biases, strict=True):
                v = (v @ weight[e] + bias[e, 0]).relu()
            experts.append(v)
        (gate_weight,), (gate_bias,) = bottom.gate.weights, bottom.gate.biases
        (weight,), (bias,) = mixture.weight_networks.weights, mixture.weight_networks.biases
        weights = torch.softmax(row @ weight[t] + bias[t], 0)
        total = 0
        for j in range(M):
            h = torch.softmax(row @ gate_weight[j] + gate_bias[j], 0) @ torch.stack(experts)
            score = torch.sigmoid(network_by_hand(mixture.networks, j, h))
            total = total + weights[j] * (score if j == t else score.detach())
        rows.append(torch.logit(total).squeeze())
    return torch.stack(rows)


def evaluate(function, inputs, parameters):
    """Output and every gradient."""
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out.square().sum(), (*leaves, *parameters))
    return {str(i): tensor.detach().cpu() for i, tensor in enumerate((out, *gradients))}


@on_every_backend
def test_score_mixture_is_the_formula_with_every_gradient(backend):
    device = device_of(backend)
    layer = randomised(ScoreMixture(M, D, (6,), backend=backend, dtype=torch.float64)).to(device)
    (x, scenario), parameters = (each.to(device) for each in batch()), tuple(layer.parameters())
    ref = evaluate(lambda x: mixture_by_hand(layer, x, scenario), (x,), parameters)
    with skip_unavailable(backend):
        assert_close(evaluate(lambda x: layer(x, scenario), (x,), parameters), ref, TOLERANCE)


@on_every_backend
def test_with_a_view_for_every_network_and_weights_that_read_something_else(backend):
    device = device_of(backend)
    layer = randomised(ScoreMixture(M, D, (6,), backend=backend, dtype=torch.float64, weight_dim=W)).to(device)
    scenario, parameters = batch()[1].to(device), tuple(layer.parameters())
    generator = torch.Generator().manual_seed(3)
    views, read = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, M, D), (B, W)))
    inputs = views.to(device), read.to(device)
    ref = evaluate(lambda x, read: mixture_by_hand(layer, x, scenario, read), inputs, parameters)
    with skip_unavailable(backend):
        out = evaluate(lambda x, read: layer(x, scenario, weight_input=read), inputs, parameters)
    assert_close(out, ref, TOLERANCE)


def hmoe(backend="auto", activation="relu"):
    bottom = MixtureOfExperts(4, D, (6, 3), M, activation, backend, dtype=torch.float64)
    return bottom, ScoreMixture(M, 3, (4,), activation, backend=backend, dtype=torch.float64, weight_dim=D)


@on_every_backend
def test_hmoe_is_the_papers_formula_with_every_gradient(backend):
    device = device_of(backend)
    bottom, mixture = parts = [randomised(part).to(device) for part in hmoe(backend)]
    (x, scenario), parameters = (each.to(device) for each in batch()), [p for each in parts for p in each.parameters()]
    ref = evaluate(lambda x: hmoe_by_hand(bottom, mixture, x, scenario), (x,), parameters)
    with skip_unavailable(backend):
        out = evaluate(lambda x: mixture(bottom.views(x, scenario), scenario, weight_input=x), (x,), parameters)
    assert_close(out, ref, TOLERANCE)


def test_gradcheck_of_the_weights_input():
    """Numeric differences see past the stop-gradient of the scores; what W_t reads is under none."""
    layer = randomised(ScoreMixture(M, D, (4,), "tanh", backend="reference", dtype=torch.float64, weight_dim=W))
    x, scenario = batch(rows=5)
    read = torch.randn(5, W, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda read: layer(x, scenario, read), (read,))


@pytest.mark.parametrize("own", range(M))
def test_rows_train_their_own_network_and_weights(own):
    layer = ScoreMixture(M, D, (6,), "tanh", dtype=torch.float64)
    layer(batch()[0], torch.full((B,), own)).sum().backward()
    for parameter in layer.parameters():
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]


@pytest.mark.parametrize("own", range(M))
def test_of_views_rows_train_experts_their_own_gate_and_network(own):
    bottom, mixture = hmoe(activation="tanh")
    x, scenario = batch()[0], torch.full((B,), own)
    mixture(bottom.views(x, scenario), scenario, weight_input=x).sum().backward()
    for parameter in (*bottom.gate.parameters(), *mixture.parameters()):
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert all(parameter.grad[e].any() for parameter in (*bottom.weights, *bottom.biases) for e in range(4))


def test_weights_are_trained_through_the_scores_of_all_scenarios():
    """∂H_t/∂W_t has Σ_j S_j ∂W_tj: a foreign network's score moves it."""
    layer = randomised(ScoreMixture(M, D, (6,), dtype=torch.float64))
    x, _ = batch()
    gradients = []
    for shift in (0.0, 1.0):
        with torch.no_grad():
            layer.networks.biases[-1][1:] += shift
        out = layer(x, torch.zeros(B, dtype=torch.int64)).sum()
        gradients.append(torch.autograd.grad(out, tuple(layer.weight_networks.parameters())))
    assert all((a != b)[0].all() for a, b in zip(*gradients, strict=True))


def test_mixture_of_extreme_predictions_stays_finite():
    layer = ScoreMixture(M, D, (6,), dtype=torch.float64)
    x, scenario = batch()
    out = layer(1e4 * x, scenario)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_mixture_of_scores_near_a_half_keeps_its_digits():
    """In float32, where log H − log(1 − H) keeps two of seven."""
    layer = ScoreMixture(M, D, ())
    scores = 1e-5 * torch.arange(1, M + 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.networks.biases[-1].copy_(scores.view_as(layer.networks.biases[-1]))
    x, scenario = torch.zeros(B, D), torch.arange(B) % M
    torch.testing.assert_close(layer(x, scenario).double(), scores.mean().expand(B), rtol=1e-5, atol=0)


def test_every_scenario_scores_every_row():
    layer = ScoreMixture(M, D, (6,), dtype=torch.float64)
    x, scenario = batch()
    logits = layer.logits(x, scenario)
    assert logits.shape == (B, M)
    for k in range(M):
        assert_close({"s": logits[:, k]}, {"s": layer.networks(x, torch.full((B,), k)).squeeze(1)}, TOLERANCE)


def test_parameters_with_one_gate_for_all_scenarios_are_refused():
    layer = ScoreMixture(M, D, (6,))
    state = {name: value for name, value in layer.state_dict().items() if name.startswith("networks.")}
    state |= {"gate.weight": torch.zeros(M, D), "gate.bias": torch.zeros(M)}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_networks\.weights\.0(.|\n)*Unexpected key.*gate"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("x", "read", "told"),
    [
        (torch.zeros(2, M, D), None, "weight_input must say"),
        (torch.zeros(2, M, D), torch.zeros(2, D), r"weight_input must have shape \(2, 4\)"),
        (torch.zeros(2, D), torch.zeros(1, W), r"weight_input must have shape \(2, 4\)"),
        (torch.zeros(2, D), None, r"weight_input must have shape \(2, 4\)"),
        (torch.zeros(2, M + 1, D), torch.zeros(2, W), "x must have shape"),
    ],
)
def test_bad_input(x, read, told):
    with pytest.raises(ValueError, match=told):
        ScoreMixture(M, D, weight_dim=W)(x, torch.zeros(2, dtype=torch.int64), read)
