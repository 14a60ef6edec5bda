"""What tests hold exact, in Triton's interpreter and out of it: derivatives place by place, sums that cancel."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from problems import Case, make
from torch import Tensor

import saml_kernels

NAN = float("nan")
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
TAIL = (80.0, 86.9, 87.1, 88.5, 89.0, 95.0, 103.9, 105.0, 200.0, 1e4, 1e10, 1e30, 3e38)
"""Where exp leaves the range of a float32, and beyond."""
NOTHING = 1e-36
"""What counts as 0: 100 times a sigmoid whose reciprocal is too large for a float32."""
NOT_FINITE_FOREIGN = (
    (torch.bfloat16, NAN),
    (torch.int8, NAN),
    (torch.int8, float("inf")),
    (torch.float8_e4m3fn, NAN),
    (torch.float8_e4m3fn, -float("inf")),
)
"""Types of foreign streams, each with a value that they must not make finite."""


def column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def one_wide(operation: str, z: Tensor, name: str, backend: str) -> Tensor:
    """δ(z) (B, 1) as a layer of width 1, weight 1 and bias 0."""
    weight, bias = torch.ones(1, 1, 1), torch.zeros(1, 1)
    if operation == "expert_outputs":
        return saml_kernels.expert_outputs(z, [weight], [bias], activation=name, backend=backend)[:, 0]
    scenario = torch.zeros(len(z), dtype=torch.int64)
    return saml_kernels.grouped_mlp(z, scenario, [weight], [bias], activation=name, backend=backend)


def value_and_derivative(function: Callable[[Tensor], Tensor], z: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """δ(z) and dv ∘ δ'(z)."""
    z = z.detach().requires_grad_()
    out = function(z)
    return out.detach(), torch.autograd.grad(out, z, dv)[0]


def check_not_a_number_goes_on(operation: str, name: str, backend: str) -> None:
    """Of arguments and cotangents that are NaN the derivative is NaN where torch's is, in float64, and only there."""
    z = column([NAN, NAN, 2.0, -2.0, 0.0, -0.0, 1e-30, -1e-30, 0.5])
    dv = column([1.5, 0.0, NAN, NAN, NAN, NAN, 1.0, 1.0, -3.0])
    out = value_and_derivative(lambda x: one_wide(operation, x, name, backend), z, dv)
    expected = value_and_derivative(TORCH[name], z.double(), dv.double())
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-12, equal_nan=True)


def check_not_finite_foreign_values(dtype: torch.dtype, value: float, backend: str) -> None:
    """A foreign view makes its row NaN by the stream that reads it, a weight the rows of other scenarios."""
    problem = make(Case(M=3, per_branch=True, activation="tanh", foreign_dtype=dtype)).to(torch.float32)
    assert problem.run(backend=backend).own.isfinite().all()
    view = dataclasses.replace(problem, x_local=problem.x_local.clone())
    view.x_local[0, (problem.scenario[0] + 1) % 3, 0] = value
    own = view.run(backend=backend).own
    assert own[0].isnan().all()
    assert own[1:].isfinite().all()
    problem.params.branch_weights[0][0, 0] = value
    assert problem.run(backend=backend).own[problem.scenario != 0].isnan().all()


def check_tail(operation: str, name: str, backend: str) -> None:
    """Far from 0 the value and the derivative are those of float64, where it is below what a float32 holds 0."""
    z = column([sign * each for each in TAIL for sign in (-1.0, 1.0)])
    out = value_and_derivative(lambda x: one_wide(operation, x, name, backend), z, torch.ones_like(z))
    expected = value_and_derivative(TORCH[name], z.double(), torch.ones_like(z).double())
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=NOTHING)


def check_closed_gate(backend: str) -> None:
    """A gate whose argument is far below 0 lets nothing pass, however large what is gated."""
    z, gated = column([-each for each in TAIL[-6:]]), torch.full((6, 1), 1e38)
    scenario, weight, bias = torch.zeros(6, dtype=torch.int64), torch.ones(1, 1, 1), torch.zeros(1, 1)
    for x in (z.requires_grad_(), gated.requires_grad_()):
        out = saml_kernels.grouped_mlp(z, scenario, [weight], [bias], gated=gated, gate_scale=2.0, backend=backend)
        assert torch.equal(out, torch.zeros(6, 1))
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(6, 1))


def cancelling(rows: int, width: int, seed: int) -> Tensor:
    """(rows, width) numbers about 2, then about −2, whose columns sum to about 1."""
    numbers = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    numbers += torch.where(torch.arange(rows) < rows // 2, 2.0, -2.0)[:, None]
    return (numbers - numbers.mean(0) + 1 / rows).float()


def bias_gradient_errors(operation: str, backend: str, rows: int = 300, width: int = 8) -> list[float]:
    """Relative errors of Σ dz over some batches of rows that cancel: with identities all of dz is given."""
    errors = []
    for seed in range(3):
        dv = cancelling(rows, width, seed)
        x, weight, bias = torch.zeros(rows, 1), torch.zeros(1, 1, width), torch.zeros(1, width, requires_grad=True)
        options = {"activation": "identity", "backend": backend}
        if operation == "expert_outputs":
            out = saml_kernels.expert_outputs(x, [weight], [bias], **options)[:, 0]
        else:
            scenario = torch.zeros(rows, dtype=torch.int64)
            out = saml_kernels.grouped_mlp(x, scenario, [weight], [bias], **options)
        (gradient,) = torch.autograd.grad(out, bias, dv)
        exact = dv.double().sum(0)
        errors.append(float((gradient[0].double() - exact).norm() / exact.norm()))
    return errors
