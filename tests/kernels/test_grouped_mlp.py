"""grouped_mlp: every row through the layers of its own scenario."""

import itertools

import naive
import problems
import pytest
import torch
from problems import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, skip_unavailable

import saml_kernels

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", problems.backends("grouped_mlp"))


def make(M=4, B=13, widths=(5, 6, 3), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    pairs = list(itertools.pairwise(widths))
    weights = [normal(M, i, o) / i**0.5 for i, o in pairs]
    biases = [0.5 + 0.3 * normal(M, o) for _, o in pairs]
    return normal(B, widths[0]), torch.randint(M, (B,), generator=generator), weights, biases


def with_gradients(function, x, scenario, weights, biases, **options):
    x, *parameters = leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    L = len(weights)
    out = function(x, scenario, parameters[:L], parameters[L:], **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    names = ["out", "∂x", *(f"∂{kind}[{i}]" for kind in ("weights", "biases") for i in range(L))]
    return dict(zip(names, [t.detach().cpu() for t in (out, *gradients)], strict=True))


def kernel(x, scenario, weights, biases, *, backend, **options):
    device = problems.device_of(backend)
    with skip_unavailable(backend):
        return with_gradients(
            saml_kernels.grouped_mlp,
            x.to(device),
            scenario.to(device),
            [w.to(device) for w in weights],
            [b.to(device) for b in biases],
            backend=backend,
            **options,
        )


@on_every_backend
@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
@pytest.mark.parametrize("output_activation", [None, "identity", "tanh"])
@pytest.mark.parametrize("widths", [(5, 6, 3), (4, 1), (3, 4, 4, 2)], ids=str)
def test_parity(activation, output_activation, widths, backend):
    options = {"activation": activation, "output_activation": output_activation}
    ref = with_gradients(naive.grouped_mlp, *make(widths=widths), **options)
    problems.assert_close(kernel(*make(widths=widths), backend=backend, **options), ref, FLOAT64_TOLERANCE)
    narrow = kernel(*make(widths=widths, dtype=torch.float32), backend=backend, **options)
    problems.assert_close(narrow, ref, FLOAT32_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("M", [1, 2, 50])
@pytest.mark.parametrize("B", [1, 2, 63])
def test_sizes(M, B, backend):
    inputs = make(M=M, B=B)
    ref = with_gradients(naive.grouped_mlp, *inputs)
    problems.assert_close(kernel(*inputs, backend=backend), ref, FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_layouts(layout, backend):
    x, scenario, weights, biases = make()

    def laid_out(t):
        if layout == "transposed":
            return t.mT.contiguous().mT
        if layout == "expanded":
            return t[:1].expand_as(t)
        return t.repeat_interleave(2, dim=-1)[..., ::2]

    strided = laid_out(x), scenario.repeat_interleave(2)[::2], [*map(laid_out, weights)], [*map(laid_out, biases)]
    ref = with_gradients(naive.grouped_mlp, *strided)
    problems.assert_close(kernel(*strided, backend=backend), ref, FLOAT64_TOLERANCE)


@on_every_backend
def test_absent_scenarios_and_empty_batches_get_zero_gradients(backend):
    x, _, weights, biases = make(M=4)
    results = kernel(x, torch.full((13,), 2), weights, biases, backend=backend)
    absent = [0, 1, 3]
    for name in ("∂weights[0]", "∂weights[1]", "∂biases[0]", "∂biases[1]"):
        assert not results[name][absent].any()
        assert results[name][2].any()
    empty = kernel(x[:0], torch.zeros(0, dtype=torch.int64), weights, biases, backend=backend)
    assert empty["out"].shape == (0, 3)
    assert not any(gradient.any() for gradient in empty.values())


@on_every_backend
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_gradcheck(second, backend):
    x, scenario, weights, biases = make(M=3, B=4, widths=(2, 3, 2))
    inputs = [t.requires_grad_() for t in (x, *weights, *biases)]

    def function(x, *parameters):
        with skip_unavailable(backend):
            return saml_kernels.grouped_mlp(
                x, scenario, list(parameters[:2]), list(parameters[2:]), activation="gelu", backend=backend
            )

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(function, inputs, fast_mode=second)
