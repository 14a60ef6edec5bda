"""The oracle itself: numbers worked out by hand, and agreement with the batched plain formulation."""

import math

import naive
import problems
import pytest
import torch
from problems import Case, make

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("score", "logits"),
    [("ratio", (0.0, 1.0)), ("softmax", (0.0, 6.0))],  # c = (0, 0.6): c / 0.6, and c / τ with τ = 0.1
)
def test_mutual_unit_by_hand(score, logits):
    v = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)
    gate_weight = torch.zeros(3, 2, 2, dtype=torch.float64)
    gate_bias = torch.tensor([[0.0, math.log(3.0)]] * 3, dtype=torch.float64)  # gates 1/2 and 3/4
    first, second = (math.exp(z) / sum(map(math.exp, logits)) for z in logits)

    out, alpha = naive.mutual_unit(v, torch.tensor([0]), gate_weight, gate_bias, score=score)

    assert alpha[0].tolist() == pytest.approx([0.0, first, second])
    assert out[0].tolist() == pytest.approx([1 + (3 * second) / 2, (2 * first + 4 * second) * 3 / 4])


def test_trunk_by_hand():
    one = torch.ones(1, dtype=torch.float64)
    params = problems.Params(
        branch_weights=[torch.tensor([[[1.0], [10.0]], [[2.0], [20.0]]], dtype=torch.float64)],
        branch_biases=[torch.tensor([[0.5], [0.25]], dtype=torch.float64)],
        aux_weights=[torch.tensor([[3.0]], dtype=torch.float64)],
        aux_biases=[one],
        gate_weights=[torch.zeros(2, 1, 1, dtype=torch.float64)],
        gate_biases=[torch.zeros(2, 1, dtype=torch.float64)],
    )
    out = naive.multi_branch(one[None] * 5, one[None] * 7, torch.tensor([1]), params)
    aux = 3 * 7 + 1
    foreign, own = 5 + 10 * aux + 0.5, 2 * 5 + 20 * aux + 0.25
    assert out.aux.item() == aux
    assert out.own.item() == pytest.approx(own + foreign / 2)  # gate 1/2, and of one foreign branch α = 1


def test_rounding():
    row = torch.tensor([-254.0, 1.0, 3.0, 5.0, 0.0], dtype=torch.float64)  # scale 2, ties to even
    assert naive.rounded(row, torch.int8, 0).tolist() == [-254.0, 0.0, 4.0, 4.0, 0.0]
    row = torch.tensor([896.0, 35.0, 1.0], dtype=torch.float64)  # scale 2; 17.5 lies between 16 and 18
    assert naive.rounded(row, torch.float8_e4m3fn, 0).tolist() == [896.0, 36.0, 1.0]
    row = torch.tensor([1.0 + 2.0**-9, 1.0 + 2.0**-7], dtype=torch.float64)
    assert naive.rounded(row, torch.bfloat16, 0).tolist() == [1.0, 1.0 + 2.0**-7]
    assert naive.rounded(torch.zeros(2, dtype=torch.float64), torch.int8, 0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("case", problems.sweep()[::5], ids=str)
def test_plain_formulation(case):
    problem = make(case)
    problems.assert_close(problems.batched_oracle(problem), problems.oracle(problem), problems.FLOAT64_TOLERANCE)


def test_oracle_gradient_is_the_gradient():
    """Without stop-gradient the oracle is an ordinary function, so finite differences judge it."""
    problem = make(Case(M=3, B=3, mutual_layers=(1, 2), activation="gelu", stop_gradient=False))
    inputs = [tensor.detach().requires_grad_() for _, tensor in problem.named()]

    def function(*tensors):
        p = problem.holding(tensors)
        return naive.multi_branch(p.x_local, p.x_global, p.scenario, p.params, **p.options)[:2]

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
