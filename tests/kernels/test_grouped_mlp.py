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


def make(M=4, B=13, widths=(5, 6, 3), dtype=torch.float64, seed=0, gate=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    pairs = list(itertools.pairwise(widths))
    weights = [normal(M, i, o) / i**0.5 for i, o in pairs]
    biases = [0.5 + 0.3 * normal(M, o) for _, o in pairs]
    inputs = normal(B, widths[0]), torch.randint(M, (B,), generator=generator), weights, biases
    return (*inputs, normal(B, widths[-1])) if gate else inputs


def with_gradients(function, x, scenario, weights, biases, gated=None, shared_weights=None, **options):
    x, *parameters = leaves = [t.detach().requires_grad_() for t in (x, *weights, *biases)]
    L = len(weights)
    if shared_weights is not None:
        options["shared_weights"] = [tensor.detach().requires_grad_() for tensor in shared_weights]
        leaves += options["shared_weights"]
    if gated is not None:
        options["gated"] = gated.detach().requires_grad_()
        leaves.append(options["gated"])
    out = function(x, scenario, parameters[:L], parameters[L:], **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, leaves, cotangent)
    names = ["out", "∂x", *(f"∂{kind}[{i}]" for kind in ("weights", "biases") for i in range(L))]
    names += [f"∂shared_weights[{i}]" for i in range(L)] if shared_weights is not None else ["∂gated"]
    return dict(zip(names, [t.detach().cpu() for t in (out, *gradients)], strict=False))


def kernel(x, scenario, weights, biases, gated=None, shared_weights=None, *, backend, **options):
    device = problems.device_of(backend)
    if shared_weights is not None:
        options["shared_weights"] = [tensor.to(device) for tensor in shared_weights]
    with skip_unavailable(backend):
        return with_gradients(
            saml_kernels.grouped_mlp,
            x.to(device),
            scenario.to(device),
            [w.to(device) for w in weights],
            [b.to(device) for b in biases],
            None if gated is None else gated.to(device),
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


# --- products of shared weights ---------------------------------------------------------------------------------------


def with_shared(x, scenario, weights, biases):
    generator = torch.Generator().manual_seed(3)
    shared = [1 + torch.randn(w.shape[1:], generator=generator).to(w.dtype) for w in weights]
    return x, scenario, weights, biases, shared


@on_every_backend
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("widths", [(5, 6, 3), (4, 1), (3, 17, 33), (0, 4)], ids=str)
def test_parity_of_products(widths, activation, backend):
    *inputs, shared = with_shared(*make(widths=widths))
    options = {"activation": activation, "output_activation": "identity"}
    ref = with_gradients(naive.grouped_mlp, *inputs, shared_weights=shared, **options)
    assert f"∂shared_weights[{len(widths) - 2}]" in ref
    found = kernel(*inputs, shared_weights=shared, backend=backend, **options)
    problems.assert_close(found, ref, FLOAT64_TOLERANCE)
    x, scenario, *lists = with_shared(*make(widths=widths))
    weights, biases, shared = ([tensor.float() for tensor in tensors] for tensors in lists)
    narrow = kernel(x.float(), scenario, weights, biases, shared_weights=shared, backend=backend, **options)
    problems.assert_close(narrow, ref, FLOAT32_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("M", [1, 2, 50])
@pytest.mark.parametrize("B", [1, 2, 63])
def test_sizes_of_products(M, B, backend):
    *inputs, shared = with_shared(*make(M=M, B=B))
    ref = with_gradients(naive.grouped_mlp, *inputs, shared_weights=shared)
    problems.assert_close(kernel(*inputs, shared_weights=shared, backend=backend), ref, FLOAT64_TOLERANCE)


@on_every_backend
def test_products_of_absent_scenarios_and_empty_batches(backend):
    x, _, weights, biases, shared = with_shared(*make(M=4))
    results = kernel(x, torch.full((13,), 2), weights, biases, shared_weights=shared, backend=backend)
    for name in ("∂weights[0]", "∂weights[1]"):
        assert not results[name][[0, 1, 3]].any()
        assert results[name][2].any()
    nobody = torch.zeros(0, dtype=torch.int64)
    empty = kernel(x[:0], nobody, weights, biases, shared_weights=shared, backend=backend)
    assert not any(gradient.any() for gradient in empty.values())


@on_every_backend
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_gradcheck_of_products(second, backend):
    x, scenario, weights, biases, shared = with_shared(*make(M=3, B=4, widths=(2, 3, 2)))
    inputs = [t.requires_grad_() for t in (x, *weights, *biases, *shared)]

    def function(x, *parameters):
        weights, biases, shared = (list(parameters[i : i + 2]) for i in (0, 2, 4))
        with skip_unavailable(backend):
            return saml_kernels.grouped_mlp(
                x, scenario, weights, biases, shared_weights=shared, activation="gelu", backend=backend
            )

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(function, inputs, fast_mode=second)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_16_bits_are_those_of_pytorch(dtype, backend):
    x, scenario, weights, biases, shared = with_shared(*make(dtype=dtype))
    found = kernel(x, scenario, weights, biases, shared_weights=shared, backend=backend)
    formed = [own * factor for own, factor in zip(weights, shared, strict=True)]
    assert torch.equal(found["out"], kernel(x, scenario, formed, biases, backend=backend)["out"])


# --- with a gate ------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
@pytest.mark.parametrize("widths", [(5, 6, 3), (4, 1), (3, 17, 33), (0, 4)], ids=str)
def test_gate_parity(widths, activation, backend):
    options = {"activation": activation, "gate_scale": 1.7}
    ref = with_gradients(naive.grouped_mlp, *make(widths=widths, gate=True), **options)
    assert "∂gated" in ref
    problems.assert_close(kernel(*make(widths=widths, gate=True), backend=backend, **options), ref, FLOAT64_TOLERANCE)
    narrow = kernel(*make(widths=widths, dtype=torch.float32, gate=True), backend=backend, **options)
    problems.assert_close(narrow, ref, FLOAT32_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("M", [1, 2, 50])
@pytest.mark.parametrize("B", [1, 63, 300])
def test_gate_sizes(M, B, backend):
    inputs = make(M=M, B=B, gate=True)
    ref = with_gradients(naive.grouped_mlp, *inputs)
    problems.assert_close(kernel(*inputs, backend=backend, output_activation="identity"), ref, FLOAT64_TOLERANCE)


@on_every_backend
def test_gate_of_absent_scenarios_and_empty_batches(backend):
    x, _, weights, biases, gated = make(M=4, gate=True)
    results = kernel(x, torch.full((13,), 2), weights, biases, gated, backend=backend)
    for name in ("∂weights[0]", "∂biases[1]"):
        assert not results[name][[0, 1, 3]].any()
        assert results[name][2].any()
    empty = kernel(x[:0], torch.zeros(0, dtype=torch.int64), weights, biases, gated[:0], backend=backend)
    assert empty["out"].shape == empty["∂gated"].shape == (0, 3)
    assert not any(gradient.any() for gradient in empty.values())


@on_every_backend
def test_gate_layouts(backend):
    x, scenario, weights, biases, gated = make(gate=True)
    strided = gated.repeat_interleave(2, dim=1)[:, ::2]
    results = kernel(x, scenario, weights, biases, strided, backend=backend)
    assert all(
        torch.equal(value, results[name])
        for name, value in kernel(x, scenario, weights, biases, gated, backend=backend).items()
    )
    expanded = kernel(x, scenario, weights, biases, gated[:1].expand(13, -1), backend=backend)
    ref = with_gradients(naive.grouped_mlp, x, scenario, weights, biases, gated[:1].expand(13, -1))
    problems.assert_close(expanded, ref, FLOAT64_TOLERANCE)


@on_every_backend
def test_gate_where_only_the_gated_is_trained(backend):
    x, scenario, weights, biases, gated = make(gate=True)
    with skip_unavailable(backend):
        leaf = gated.to(problems.device_of(backend)).requires_grad_()
        inputs = (
            (t.to(leaf.device) for t in (x, scenario)),
            ([t.to(leaf.device) for t in ts] for ts in (weights, biases)),
        )
        out = saml_kernels.grouped_mlp(*(each for pair in inputs for each in pair), gated=leaf, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    problems.assert_close({"∂": gradient.cpu() * gated}, {"∂": out.detach().cpu()}, FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_gate_gradcheck(second, backend):
    x, scenario, weights, biases, gated = make(M=3, B=4, widths=(2, 3, 2), gate=True)
    inputs = [t.requires_grad_() for t in (x, gated, *weights, *biases)]

    def function(x, gated, *parameters):
        layers = list(parameters[:2]), list(parameters[2:])
        with skip_unavailable(backend):
            return saml_kernels.grouped_mlp(x, scenario, *layers, activation="gelu", gated=gated, backend=backend)

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(function, inputs, fast_mode=second)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_errs_at_most_twice_as_much_as_plain_torch(dtype, backend):
    """Wide enough that an error is an average and not the rounding of a few numbers."""
    if backend == "triton" and dtype == torch.bfloat16 and problems.device_of(backend) == "cpu":
        pytest.skip("the interpreter's bfloat16 products are wrong")
    inputs = make(M=3, B=200, widths=(33, 40, 20), dtype=dtype, gate=True)
    wide = [[t.double() for t in each] if isinstance(each, list) else each for each in inputs]
    exact = with_gradients(naive.grouped_mlp, wide[0].double(), wide[1], wide[2], wide[3], wide[4].double())
    plain = problems.errors(with_gradients(naive.grouped_mlp, *inputs), exact)
    out = kernel(*inputs, backend=backend)
    assert {tensor.dtype for tensor in out.values()} == {dtype}
    wrong = {
        name: (error, plain[name])
        for name, error in problems.errors(out, exact).items()
        if not error <= 2 * plain[name]
    }
    assert not wrong


def test_gate_under_autocast():
    x, scenario, weights, biases, gated = make(dtype=torch.float32, gate=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = saml_kernels.grouped_mlp(x, scenario, weights, biases, gated=gated)
    low = [t.bfloat16() for t in weights], [t.bfloat16() for t in biases]
    assert torch.equal(out, saml_kernels.grouped_mlp(x.bfloat16(), scenario, *low, gated=gated.bfloat16()))


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"output_activation": "relu"}, ValueError, "output_activation must be None or 'identity' with gated"),
        ({"gated": torch.zeros(7, 3)}, ValueError, r"gated must have shape \(7, 2\)"),
        ({"gated": torch.zeros(6, 2)}, ValueError, r"gated must have shape \(7, 2\)"),
        ({"gated": torch.zeros(7, 2).double()}, TypeError, "x is torch.float32 but gated is torch.float64"),
        ({"gated": 1.0}, TypeError, "gated must be a tensor"),
        ({"gate_scale": 0.0}, ValueError, "gate_scale must be finite and above 0"),
        ({"gate_scale": "2"}, TypeError, "gate_scale must be a number"),
    ],
)
def test_gate_bad_input(changes, error, told):
    good = {
        "x": torch.zeros(7, 3),
        "scenario": torch.zeros(7, dtype=torch.long),
        "weights": [torch.zeros(3, 3, 2)],
        "biases": [torch.zeros(3, 2)],
        "gated": torch.ones(7, 2),
    }
    assert torch.equal(saml_kernels.grouped_mlp(**good), torch.ones(7, 2))
    with pytest.raises(error, match=told):
        saml_kernels.grouped_mlp(**(good | changes))
