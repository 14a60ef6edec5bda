"""Mixtures of experts: the formula."""

import pytest
import torch
from layer_batches import TOLERANCE, D, M, batch, randomised
from problems import assert_close

from saml_kernels.layers import MixtureOfExperts

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("scenarios", [None, M])
def test_mixture_of_experts_is_the_formula(scenarios):
    layer = randomised(MixtureOfExperts(4, D, (6, 2), scenarios, dtype=torch.float64))
    x, scenario = batch()
    rows = []
    for row, t in zip(x, scenario.tolist(), strict=True):
        logits = layer.gate(row) if scenarios is None else row @ layer.gate.weights[0][t] + layer.gate.biases[0][t]
        experts = []
        for k in range(4):
            v = row
            for weight, bias in zip(layer.weights, layer.biases, strict=True):
                v = (v @ weight[k] + bias[k, 0]).relu()
            experts.append(v)
        rows.append(torch.softmax(logits, 0) @ torch.stack(experts))
    out = layer(x) if scenarios is None else layer(x, scenario)
    assert_close({"out": out}, {"out": torch.stack(rows)}, TOLERANCE)
