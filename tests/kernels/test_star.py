"""STAR's network: the formula, where it starts, who trains what."""

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close

from saml_kernels.layers import STARMLP

pytestmark = pytest.mark.cpu


def star_by_hand(layer, x, scenario):
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        for index in range(len(layer.hidden_dims)):
            weight = layer.weights[index][t] * layer.shared_weights[index]
            row = row @ weight + layer.biases[index][t] + layer.shared_biases[index]
            row = row if index == len(layer.hidden_dims) - 1 else row.relu()
        rows.append(row)
    return torch.stack(rows)


def test_star_is_the_formula_with_every_gradient():
    layer = randomised(STARMLP(M, D, (6, 2), output_activation="identity", dtype=torch.float64))
    x, scenario = batch()

    def evaluate(function):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        gradients = torch.autograd.grad(out.square().sum(), (leaf, *layer.parameters()))
        return {str(i): tensor.detach() for i, tensor in enumerate((out, *gradients))}

    ref = evaluate(lambda leaf: star_by_hand(layer, leaf, scenario))
    assert_close(evaluate(lambda leaf: layer(leaf, scenario)), ref, TOLERANCE)


def test_star_starts_with_scenarios_alike():
    layer = STARMLP(M, D, (4, 3), dtype=torch.float64)
    x, _ = batch()
    outputs = [layer(x, torch.full((B,), k)) for k in range(M)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert sum(p.numel() for p in layer.parameters()) == (M + 1) * (D * 4 + 4 + 4 * 3 + 3)


@pytest.mark.parametrize("own", range(M))
def test_star_rows_train_their_own_scenario_and_the_shared_network(own):
    layer = STARMLP(M, D, (4, 1), "tanh", dtype=torch.float64)
    layer(batch()[0], torch.full((B,), own)).sum().backward()
    for parameter in (*layer.weights, *layer.biases):
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert all(parameter.grad.any() for parameter in (*layer.shared_weights, *layer.shared_biases))
