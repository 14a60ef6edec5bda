"""Where a kernel was once not exact: NaN through relu, tails of silu and of gates, sums that cancel, low precision.

The Triton kernels are held to the same in tests/triton/test_interpreter.py.
"""

import dataclasses
import functools
import statistics

import exactness
import pytest
import torch
from problems import FLOAT32_TOLERANCE, Case, Problem, backends, batched_oracle, errors, kernel, make

from saml_kernels.testing.problem import Results

OPERATIONS = ("grouped_mlp", "expert_outputs")
on_every_backend = pytest.mark.parametrize("backend", backends("grouped_mlp"))


@on_every_backend
@pytest.mark.parametrize("name", exactness.TORCH)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_not_a_number_goes_on(operation, name, backend):
    exactness.check_not_a_number_goes_on(operation, name, backend)


@on_every_backend
@pytest.mark.parametrize("name", ["silu", "tanh"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tail(operation, name, backend):
    exactness.check_tail(operation, name, backend)


@on_every_backend
def test_closed_gate(backend):
    exactness.check_closed_gate(backend)


@on_every_backend
@pytest.mark.parametrize("operation", OPERATIONS)
def test_bias_gradient_of_rows_that_cancel(operation, backend):
    assert max(exactness.bias_gradient_errors(operation, backend)) <= FLOAT32_TOLERANCE


# Wide enough that an error is an average and not the rounding of a few numbers.
LOW_PRECISION = Case(
    M=4, B=120, local_dim=33, hidden_dims=(32, 24, 16), aux_dims=(24, 16, 12), mutual_layers=(1, 2), activation="relu"
)


@functools.cache
def yardsticks(case: Case, dtype: torch.dtype) -> list[tuple[Problem, Results, dict[str, float]]]:
    """30 problems, their exact results, and by tensor the error of plain PyTorch in that type."""
    problems = [make(dataclasses.replace(case, seed=seed)).to(dtype) for seed in range(30)]
    exact = [batched_oracle(problem) for problem in problems]
    plain = [errors(batched_oracle(problem, dtype), ref) for problem, ref in zip(problems, exact, strict=True)]
    return list(zip(problems, exact, plain, strict=True))


def ratios_to_plain_torch(case: Case, dtype: torch.dtype, backend: str) -> dict[str, list[float]]:
    """By tensor the 30 ratios of its error to that of plain PyTorch."""
    ratios: dict[str, list[float]] = {}
    for problem, exact, plain in yardsticks(case, dtype):
        for name, error in errors(kernel(problem, backend), exact).items():
            ratios.setdefault(name, []).append(error / plain[name])
    return ratios


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_plain_torch(dtype, backend):
    """Twice its error at most, by the median: a ReLU whose argument falls on the other side of 0 says nothing."""
    medians = {k: statistics.median(v) for k, v in ratios_to_plain_torch(LOW_PRECISION, dtype, backend).items()}
    assert {name: median for name, median in medians.items() if not median <= 2} == {}


@pytest.mark.parametrize("backend", [name for name in backends("grouped_mlp") if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("activation", "score"), [("silu", "ratio"), ("tanh", "softmax")])
def test_low_precision_without_kinks_errs_no_more_than_plain_torch(activation, score, dtype, backend):
    """Twice its error at most in the worst of the problems. (The reference is plain PyTorch.)

    Streams of either sign, tanh's, only meet the softmax: a sum of cosines near 0, by which the ratio divides, is a
    kink too.
    """
    smooth = dataclasses.replace(LOW_PRECISION, activation=activation, score=score)
    worst = {name: max(ratios) for name, ratios in ratios_to_plain_torch(smooth, dtype, backend).items()}
    assert {name: ratio for name, ratio in worst.items() if not ratio <= 2} == {}
