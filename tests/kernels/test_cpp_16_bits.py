"""Inputs and parameters in 16 bits: widened exactly where the compiled CPU kernels read them, and never whole."""

from itertools import pairwise

import pytest
import torch
from cpp_runs import CPP_ONLY, run
from problems import Case, make
from test_cpp_saved import bytes_allocated

import saml_kernels

pytestmark = CPP_ONLY

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def every_value(dtype, columns):
    """All finite numbers of the type, rows of them; zeros at the end."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    rows = -(-len(numbers) // columns)
    return torch.cat([numbers, numbers.new_zeros(rows * columns - len(numbers))]).view(rows, columns)


@pytest.mark.parametrize("flush", [False, True], ids=["subnormal", "flushed"])
@pytest.mark.parametrize("rows", [1, 7, 40], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("columns", [16, 70])
def test_every_float16_is_read_and_written_exactly(columns, rows, flush, capability):
    """As an input and as a weight, beside the identity, also where subnormal floats count as 0."""
    values = every_value(torch.float16, columns)
    identity, nothing = torch.eye(columns).half(), torch.zeros(1, columns).half()
    torch.set_flush_denormal(flush)
    try:
        for begin in range(0, len(values), 700):
            x = values[begin : begin + 700]
            scenario = torch.zeros(len(x), dtype=torch.int64)
            out = saml_kernels.grouped_mlp(
                x, scenario, [identity[None]], [nothing], output_activation="identity", backend="cpp"
            )
            assert torch.equal(out, x)
            some = torch.eye(len(x))[:rows].half()
            out = saml_kernels.grouped_mlp(
                some, scenario[:rows], [x[None]], [nothing], output_activation="identity", backend="cpp"
            )
            assert torch.equal(out, x[:rows])
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf"), 70000.0, 65519.0, 65520.0, 2e-8, 3e-8])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_what_is_rounded(what, dtype, capability):
    """As torch rounds a float: to the nearest, beyond the range to infinity, and NaN stays one."""
    values = torch.tensor([[what, -what, 1.0, 1.00048828125]])
    x, weight = torch.ones(2, 3, dtype=dtype), torch.zeros(1, 3, 4, dtype=dtype)
    call = (torch.zeros(2, dtype=torch.int64), [weight.requires_grad_()], [torch.zeros(1, 4, dtype=dtype)])
    out = saml_kernels.grouped_mlp(x, *call, output_activation="identity", backend="cpp")
    gradient = values.to(dtype).expand(2, 4) * 0.75
    (found,) = torch.autograd.grad(out, weight, gradient)
    expected = (2 * gradient[:1].float()).to(dtype).expand(3, 4)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("B", [5, 40, 1003])
@pytest.mark.parametrize("options", [{}, {"mutual_layers": ()}, {"per_branch": True}], ids=str)
def test_float16_gives_what_its_floats_give(B, options, capability):
    """Outputs and gradients are the float32 ones of the same numbers, rounded once."""
    case = Case(M=3, B=B, local_dim=33, hidden_dims=(70, 17), aux_dims=(17, 9), **options)
    problem = make(case).to(torch.float16)
    out, exact = run(problem), run(problem.to(torch.float32))
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, exact[name].to(tensor.dtype), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_weights_and_inputs_are_never_widened_whole(dtype, capability):
    rows = 200
    problem = make(Case(M=4, B=rows, local_dim=1000, hidden_dims=(64, 8), mutual_layers=())).to(dtype).leaves()
    inputs = [tensor for _, tensor in problem.named()]
    weights = sum(tensor.numel() * 2 for tensor in problem.params.branch_weights)
    # AMX reads bfloat16 weights from tiles of bfloat16.
    tiles = weights if capability == "amx" and dtype == torch.bfloat16 else 0

    def backward():
        torch.autograd.grad(out, inputs, cotangents)

    with torch.no_grad():
        assert bytes_allocated(lambda: problem.run(backend="cpp")) < tiles + weights / 2
    outputs = problem.run(backend="cpp")
    out, cotangents = (outputs.own, outputs.aux), problem.cotangents
    # Gradients of parameters and inputs in 16 bits, those of the pre-activations in floats.
    gradients = sum(tensor.numel() * 2 for tensor in inputs)
    assert bytes_allocated(backward) < gradients + tiles + weights / 2 + 2 * rows * (64 + 8) * 4


def test_backward_rounds_what_it_writes_and_factors_where_an_instruction_multiplies_them(capability):
    """A pre-activation's gradient, here (1 + 2^-10, 1) and (-1, -1), stands in bfloat16 for the weights' gradients.
    Elsewhere the input's takes the float that it is."""
    first = torch.tensor([[[1.0, -1.0]]]).bfloat16().requires_grad_()
    second = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]).bfloat16()
    biases = [torch.zeros(1, 2).bfloat16() for _ in range(2)]
    x = torch.ones(2, 1).bfloat16().requires_grad_()
    out = saml_kernels.grouped_mlp(
        x,
        torch.zeros(2, dtype=torch.int64),
        [first, second],
        biases,
        activation="identity",
        output_activation="identity",
        backend="cpp",
    )
    cotangent = torch.tensor([[1.0, 2**-10], [-1.0, 0.0]]).bfloat16()
    dx, dw = torch.autograd.grad(out, [x, first], cotangent)
    left = 0.0 if capability in ("avx512_bf16", "amx") else 2**-10
    assert dx.flatten().tolist() == [left, 0.0]
    assert dw.flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("B", [1, 5, 200])
@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
def test_float16_experts_give_what_their_floats_give(B, activation, capability):
    """tanh apart, whose derivative is of the result, which is rounded."""
    widths, K = (37, 70, 17), 3
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).div(shape[-1] ** 0.5).half()

    x, cotangent = numbers(B, widths[0]), numbers(B, K, widths[-1])
    weights = [numbers(K, *pair) for pair in pairwise(widths)]
    biases = [numbers(K, width) for width in widths[1:]]

    def gradients(dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, *weights, *biases)]
        layers = leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
        out = saml_kernels.expert_outputs(leaves[0], *layers, activation=activation, backend="cpp")
        return out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))

    for found, exact in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, exact.half(), rtol=0, atol=0)


@pytest.mark.parametrize("gate_width", [17, 1], ids=["vector", "scalar"])
def test_a_float16_mutual_unit_gives_what_its_floats_give(gate_width, capability):
    generator = torch.Generator().manual_seed(2)
    B, M, d = 103, 4, 17
    scenario = torch.randint(M, (B,), generator=generator)
    tensors = [torch.randn(*shape, generator=generator).half() for shape in ((B, M, d), (M, d, gate_width))]
    bias, cotangent = torch.randn(M, gate_width, generator=generator).half(), torch.randn(B, d, generator=generator)

    def results(dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (*tensors, bias)]
        out, scores = saml_kernels.mutual_unit(
            leaves[0], scenario, *leaves[1:], score="softmax", return_scores=True, backend="cpp"
        )
        return out, scores, *torch.autograd.grad(out, leaves, cotangent.half().to(dtype))

    for found, exact in zip(results(torch.float16), results(torch.float32), strict=True):
        torch.testing.assert_close(found, exact.to(found.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_experts_and_their_input_are_never_widened_whole(dtype, capability):
    rows, K, widths = 200, 4, (2000, 64, 8)
    x = torch.zeros(rows, widths[0], dtype=dtype, requires_grad=True)
    weights = [torch.zeros(K, *pair, dtype=dtype, requires_grad=True) for pair in pairwise(widths)]
    biases = [torch.zeros(K, width, dtype=dtype) for width in widths[1:]]
    parameters = sum(weight.numel() * 2 for weight in weights)
    # Every tile reads all experts: where an instruction multiplies bfloat16, panels of it are laid out, tiles of AMX in
    # three parts for float16; elsewhere, for backward alone, transposes as floats.
    multiplied = dtype == torch.bfloat16 and capability in ("avx512_bf16", "amx")
    forward_bytes, backward_bytes = (2, 2) if multiplied else (6, 6) if capability == "amx" else (0, 4)
    forward_layouts, backward_layouts = (1.1 * parameters / 2 * each for each in (forward_bytes, backward_bytes))
    results = rows * K * (widths[1] * 4 + widths[2] * 2)

    def forward():
        return saml_kernels.expert_outputs(x, weights, biases, backend="cpp")

    with torch.no_grad():
        assert bytes_allocated(forward) < forward_layouts + results
    out = forward()
    gradients = x.numel() * 2 + parameters + 2 * results
    allocated = bytes_allocated(lambda: torch.autograd.grad(out, [x, *weights], torch.zeros_like(out)))
    assert allocated < backward_layouts + gradients
