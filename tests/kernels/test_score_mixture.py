"""HMoE's mixture of scores: the formula, who trains what."""

import pytest
import torch
from layer_batches import TOLERANCE, B, D, M, batch, randomised
from problems import assert_close

from saml_kernels.layers import ScoreMixture

pytestmark = pytest.mark.cpu


def mixture_by_hand(layer, x, scenario):
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        weights = torch.softmax(layer.gate(row), 0)
        total = 0
        for j in range(M):
            v = row
            for index, (weight, bias) in enumerate(zip(layer.networks.weights, layer.networks.biases, strict=True)):
                v = v @ weight[j] + bias[j]
                v = v if index == len(layer.networks.weights) - 1 else v.relu()
            total = total + weights[j] * torch.sigmoid(v if j == t else v.detach())
        rows.append(torch.logit(total).squeeze())
    return torch.stack(rows)


def test_score_mixture_is_the_formula_with_every_gradient():
    layer = randomised(ScoreMixture(M, D, (6,), dtype=torch.float64))
    x, scenario = batch()

    def evaluate(function):
        out = function(x)
        gradients = torch.autograd.grad(out.square().sum(), tuple(layer.parameters()))
        return {str(i): tensor.detach() for i, tensor in enumerate((out, *gradients))}

    assert_close(
        evaluate(lambda x: layer(x, scenario)), evaluate(lambda x: mixture_by_hand(layer, x, scenario)), TOLERANCE
    )


@pytest.mark.parametrize("own", range(M))
def test_rows_train_their_own_network_and_the_gate(own):
    layer = ScoreMixture(M, D, (6,), "tanh", dtype=torch.float64)
    layer(batch()[0], torch.full((B,), own)).sum().backward()
    for parameter in layer.networks.parameters():
        assert [bool(parameter.grad[k].any()) for k in range(M)] == [k == own for k in range(M)]
    assert layer.gate.weight.grad.any()


def test_mixture_of_extreme_predictions_stays_finite():
    layer = ScoreMixture(M, D, (6,), dtype=torch.float64)
    x, scenario = batch()
    out = layer(1e4 * x, scenario)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_every_scenario_scores_every_row():
    layer = ScoreMixture(M, D, (6,), dtype=torch.float64)
    x, scenario = batch()
    logits = layer.logits(x, scenario)
    assert logits.shape == (B, M)
    for k in range(M):
        assert_close({"s": logits[:, k]}, {"s": layer.networks(x, torch.full((B,), k)).squeeze(1)}, TOLERANCE)
