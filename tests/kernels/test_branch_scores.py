"""branch_scores: every tower on every row, training through the own tower only."""

import itertools

import naive
import problems
import pytest
import torch
from problems import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, skip_unavailable

import saml_kernels
from saml_kernels.activations import ACTIVATIONS

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", problems.backends("branch_scores"))


def make(M=3, B=17, widths=(5, 6, 2), dtype=torch.float64, per_branch=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [normal(M, i, o) / i**0.5 for i, o in itertools.pairwise(widths)]
    biases = [0.5 + 0.3 * normal(M, o) for o in widths[1:]]
    x = normal(B, M, widths[0]) if per_branch else normal(B, widths[0])
    return x, torch.randint(M, (B,), generator=generator), weights, biases


def one_by_one(x, scenario, weights, biases, activation="relu", output_activation="identity"):
    """S_j(x_n) row by row and tower by tower, foreign ones detached."""
    L, rows = len(weights), []
    for n, t in enumerate(scenario.tolist()):
        row = []
        for j in range(weights[0].shape[0]):
            v = x[n, j] if x.dim() == 3 else x[n]
            for layer in range(L):
                v = v @ weights[layer][j] + biases[layer][j]
                v = ACTIVATIONS[activation if layer < L - 1 else output_activation].function(v)
            row.append(v if j == t else v.detach())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def with_gradients(function, x, scenario, weights, biases, **options):
    x, *parameters = leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    L = len(weights)
    out = function(x, scenario, parameters[:L], parameters[L:], **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.device, out.dtype))
    names = ["out", "∂x", *(f"∂{kind}[{i}]" for kind in ("weights", "biases") for i in range(L))]
    return dict(zip(names, [t.detach().cpu() for t in (out, *gradients)], strict=True))


def kernel(x, scenario, weights, biases, *, backend, **options):
    device = problems.device_of(backend)
    with skip_unavailable(backend):
        return with_gradients(
            saml_kernels.branch_scores,
            x.to(device),
            scenario.to(device),
            [w.to(device) for w in weights],
            [b.to(device) for b in biases],
            backend=backend,
            **({"output_activation": "identity"} | options),
        )


@on_every_backend
@pytest.mark.parametrize("per_branch", [False, True], ids=["one view", "views"])
@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
@pytest.mark.parametrize("widths", [(5, 6, 2), (4, 1), (3, 17, 33, 1)], ids=str)
def test_parity(widths, activation, per_branch, backend):
    ref = with_gradients(one_by_one, *make(widths=widths, per_branch=per_branch), activation=activation)
    for dtype, tolerance in ((torch.float64, FLOAT64_TOLERANCE), (torch.float32, FLOAT32_TOLERANCE)):
        inputs = make(widths=widths, per_branch=per_branch, dtype=dtype)
        problems.assert_close(kernel(*inputs, backend=backend, activation=activation), ref, tolerance)


@on_every_backend
@pytest.mark.parametrize(("M", "B"), [(1, 1), (1, 300), (3, 400), (50, 63), (4, 0)])
def test_sizes(M, B, backend):
    inputs = make(M=M, B=B, widths=(7, 33, 5))
    if B == 0:
        assert kernel(*inputs, backend=backend)["out"].shape == (0, M, 5)
        return
    ref = with_gradients(one_by_one, *inputs)
    problems.assert_close(kernel(*inputs, backend=backend), ref, FLOAT64_TOLERANCE)
    x, scenario, weights, biases = inputs
    narrow = x.float(), scenario, [w.float() for w in weights], [b.float() for b in biases]
    problems.assert_close(kernel(*narrow, backend=backend), ref, FLOAT32_TOLERANCE)


@on_every_backend
def test_own_entries_are_those_of_the_grouped_mlp(backend):
    x, scenario, weights, biases = make(M=4, B=50)
    out = kernel(x, scenario, weights, biases, backend=backend)["out"]
    own = naive.grouped_mlp(x, scenario, weights, biases, output_activation="identity")
    problems.assert_close({"own": out[torch.arange(50), scenario]}, {"own": own.detach()}, FLOAT64_TOLERANCE)


@on_every_backend
def test_cotangents_of_foreign_entries_are_not_read(backend):
    x, scenario, weights, biases = make(M=3, B=9)
    device = problems.device_of(backend)
    leaf = x.to(device).requires_grad_()
    with skip_unavailable(backend):
        out = saml_kernels.branch_scores(
            leaf, scenario.to(device), [w.to(device) for w in weights], [b.to(device) for b in biases], backend=backend
        )
    cotangent = torch.full_like(out, torch.nan)
    cotangent[torch.arange(9), scenario] = 1.0
    (gradient,) = torch.autograd.grad(out, leaf, cotangent)
    assert gradient.isfinite().all()
    assert gradient.any()


@on_every_backend
def test_second_derivative(backend):
    x, scenario, weights, biases = make(M=2, B=5)
    device = problems.device_of(backend)
    with skip_unavailable(backend):
        assert torch.autograd.gradgradcheck(
            lambda x, w: saml_kernels.branch_scores(
                x, scenario.to(device), [w, weights[1].to(device)], biases, activation="tanh", backend=backend
            )[torch.arange(5), scenario],
            (x.to(device).requires_grad_(), weights[0].to(device).requires_grad_()),
        )


@on_every_backend
def test_foreign_dtype_rounds_foreign_entries_only(backend):
    x, scenario, weights, biases = make(M=3, B=200, widths=(33, 40, 1), dtype=torch.float32)
    full = kernel(x, scenario, weights, biases, backend=backend)
    rounded = kernel(x, scenario, weights, biases, backend=backend, foreign_dtype=torch.bfloat16)
    own = torch.nn.functional.one_hot(scenario, 3).bool()
    assert torch.equal(rounded["out"][own], full["out"][own])
    foreign = (rounded["out"][~own] - full["out"][~own]).norm() / full["out"][~own].norm()
    assert 0 < foreign < 2e-2
    for name in ("∂x", "∂weights[0]", "∂biases[1]"):
        problems.assert_close({name: rounded[name]}, {name: full[name]}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"x": torch.zeros(7, 2)}, r"x must have shape \(B, d_0\) or \(B, M, d_0\)|weights\[0\] must have shape"),
        ({"x": torch.zeros(7, 4, 3)}, r"x must have shape \(B, 3, d_0\) with M = 3 towers"),
        ({"output_activation": "sigmoid"}, "output_activation must be one of"),
        ({"foreign_dtype": torch.float16}, "foreign_dtype must be None or one of"),
        ({"scenario": torch.full((7,), 3)}, r"row 0 holds 3"),
    ],
)
def test_bad_input(changes, told):
    good = {
        "x": torch.zeros(7, 3),
        "scenario": torch.zeros(7, dtype=torch.long),
        "weights": [torch.zeros(3, 3, 2)],
        "biases": [torch.zeros(3, 2)],
    }
    assert saml_kernels.branch_scores(**good).shape == (7, 3, 2)
    with pytest.raises(ValueError, match=told):
        saml_kernels.branch_scores(**(good | changes))
