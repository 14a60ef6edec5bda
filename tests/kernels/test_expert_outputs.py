"""expert_outputs: every expert on every row, every row trains every expert."""

import itertools

import naive
import problems
import pytest
import torch
from problems import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, skip_unavailable

import saml_kernels

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", problems.backends("expert_outputs"))


def make(K=3, B=13, widths=(5, 6, 3), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [normal(K, i, o) / max(i, 1) ** 0.5 for i, o in itertools.pairwise(widths)]
    biases = [0.5 + 0.3 * normal(K, o) for o in widths[1:]]
    return normal(B, widths[0]), weights, biases


def with_gradients(function, x, weights, biases, **options):
    x, *parameters = leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    L = len(weights)
    out = function(x, parameters[:L], parameters[L:], **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(out, leaves, cotangent.to(out.device, out.dtype))
    names = ["out", "∂x", *(f"∂{kind}[{i}]" for kind in ("weights", "biases") for i in range(L))]
    return dict(zip(names, [t.detach().cpu() for t in (out, *gradients)], strict=True))


def kernel(x, weights, biases, *, backend, **options):
    device = problems.device_of(backend)
    with skip_unavailable(backend):
        layers = ([t.to(device) for t in each] for each in (weights, biases))
        return with_gradients(saml_kernels.expert_outputs, x.to(device), *layers, backend=backend, **options)


@on_every_backend
@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
@pytest.mark.parametrize("output_activation", [None, "identity", "silu", "tanh"])
@pytest.mark.parametrize("widths", [(5, 6, 3), (4, 1), (3, 17, 33, 2)], ids=str)
def test_parity(activation, output_activation, widths, backend):
    options = {"activation": activation, "output_activation": output_activation}
    ref = with_gradients(naive.expert_outputs, *make(widths=widths), **options)
    problems.assert_close(kernel(*make(widths=widths), backend=backend, **options), ref, FLOAT64_TOLERANCE)
    narrow = kernel(*make(widths=widths, dtype=torch.float32), backend=backend, **options)
    problems.assert_close(narrow, ref, FLOAT32_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize(("K", "B"), [(1, 1), (1, 300), (3, 400), (50, 63), (2, 97)])
@pytest.mark.parametrize("widths", [(7, 33, 5), (47, 98, 65)], ids=str)
def test_sizes(K, B, widths, backend):
    """Also of batches large enough that weights are laid out first."""
    inputs = make(K=K, B=B, widths=widths, dtype=torch.float32)
    exact = [t.double() for t in inputs[1]], [t.double() for t in inputs[2]]
    ref = with_gradients(
        saml_kernels.expert_outputs, inputs[0].double(), *exact, activation="gelu", backend="reference"
    )
    problems.assert_close(kernel(*inputs, backend=backend, activation="gelu"), ref, FLOAT32_TOLERANCE)


@on_every_backend
def test_a_batch_without_rows_and_an_input_without_columns(backend):
    x, weights, biases = make(B=0)
    results = kernel(x, weights, biases, backend=backend)
    assert results["out"].shape == (0, 3, 3)
    assert not any(gradient.any() for gradient in results.values())
    inputs = make(widths=(0, 4, 2))
    ref = with_gradients(naive.expert_outputs, *inputs)
    problems.assert_close(kernel(*inputs, backend=backend), ref, FLOAT64_TOLERANCE)


@on_every_backend
def test_layouts(backend):
    x, weights, biases = make()
    strided = x.T.contiguous().T, [w.mT.contiguous().mT for w in weights], [b[:1].expand_as(b) for b in biases]
    ref = with_gradients(naive.expert_outputs, *strided)
    problems.assert_close(kernel(*strided, backend=backend), ref, FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_gradcheck(second, backend):
    x, weights, biases = make(B=4, widths=(2, 3, 2))
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]

    def function(x, *parameters):
        layers = list(parameters[:2]), list(parameters[2:])
        with skip_unavailable(backend):
            return saml_kernels.expert_outputs(x, *layers, activation="tanh", backend=backend)

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(function, inputs, fast_mode=second)


@on_every_backend
def test_only_what_requires_a_gradient_gets_one(backend):
    """The same numbers where x is a constant, and for one layer's weights alone."""
    x, weights, biases = (
        each.to(problems.device_of(backend)) if isinstance(each, torch.Tensor) else each
        for each in make(dtype=torch.float32)
    )
    every = kernel(x, weights, biases, backend=backend)
    leaf = weights[0].to(x.device).requires_grad_()
    with skip_unavailable(backend):
        layers = [leaf, weights[1].to(x.device)], [b.to(x.device) for b in biases]
        out = saml_kernels.expert_outputs(x, *layers, backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, leaf, cotangent.to(out))
    assert torch.equal(gradient.cpu(), every["∂weights[0]"])


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_plain_torch(dtype, backend):
    if backend == "triton" and dtype == torch.bfloat16 and problems.device_of(backend) == "cpu":
        pytest.skip("the interpreter's bfloat16 products are wrong")
    inputs = make(B=200, widths=(33, 40, 20), dtype=dtype)
    exact = [t.double() for t in inputs[1]], [t.double() for t in inputs[2]]
    ref = with_gradients(naive.expert_outputs, inputs[0].double(), *exact, activation="silu")
    plain = problems.errors(with_gradients(naive.expert_outputs, *inputs, activation="silu"), ref)
    out = kernel(*inputs, backend=backend, activation="silu")
    assert {tensor.dtype for tensor in out.values()} == {dtype}
    wrong = {
        name: (error, plain[name]) for name, error in problems.errors(out, ref).items() if not error <= 2 * plain[name]
    }
    assert not wrong


def test_under_autocast():
    x, weights, biases = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = saml_kernels.expert_outputs(x, weights, biases)
    low = [t.bfloat16() for t in weights], [t.bfloat16() for t in biases]
    assert torch.equal(out, saml_kernels.expert_outputs(x.bfloat16(), *low))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"x": torch.zeros(7, 2)}, ValueError, r"weights\[0\] must have shape \(3, 2, d_l\)"),
        ({"x": torch.zeros(7, 3, 3)}, ValueError, r"x must have shape \(B, d_0\)"),
        ({"x": [[0.0]]}, TypeError, "x must be a tensor"),
        ({"weights": [torch.zeros(0, 3, 2)]}, ValueError, r"weights\[0\] must hold at least one expert, got 0"),
        ({"weights": [torch.zeros(3, 2)]}, ValueError, r"weights\[0\] must have shape \(K, d_0, d_1\)"),
        ({"biases": [torch.zeros(2, 2)]}, ValueError, r"biases\[0\] must have shape \(3, 2\)"),
        ({"biases": []}, ValueError, "must hold the same number of layers"),
        ({"output_activation": "sigmoid"}, ValueError, "output_activation must be one of"),
        ({"activation": "rleu"}, ValueError, "did you mean 'relu'"),
        ({"x": torch.zeros(7, 3).double()}, TypeError, "one dtype is needed"),
    ],
)
def test_bad_input(changes, error, told):
    good = {"x": torch.zeros(7, 3), "weights": [torch.zeros(3, 3, 2)], "biases": [torch.zeros(3, 2)]}
    assert saml_kernels.expert_outputs(**good).shape == (7, 3, 2)
    with pytest.raises(error, match=told):
        saml_kernels.expert_outputs(**(good | changes))
