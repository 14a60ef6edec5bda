"""What the compiled CPU kernels allocate, save for backward, and hold at their worst moment."""

from itertools import accumulate

import pytest
import torch
from cpp_runs import CPP_ONLY, SEVERAL_TILES
from problems import Case, make

import saml_kernels

pytestmark = CPP_ONLY


def bytes_allocated(function):
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return sum(max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profile.key_averages())


def peak_bytes(function):
    """The most that torch's allocator held during the call, more than before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def test_streams_of_all_branches_make_room_for_the_gradients_of_weights(capability):
    """Unless the graph is kept, a step never holds both."""
    if capability == "amx":
        pytest.skip("the transposed weights it reads in three parts, beside the streams, are more than the gradients")
    B, M, d = 500, 16, 64
    problem = make(Case(M=M, B=B, local_dim=600, hidden_dims=(d, 4), aux_dims=(4, 4))).to(torch.float32).leaves()
    streams = B * M * d * 4
    weights = sum(tensor.numel() * 4 for name, tensor in problem.named() if not name.startswith("x_"))
    inputs = [tensor for _, tensor in problem.named()]

    def step(keep):
        out = problem.run(backend="cpp", recompute=False).own.sum()
        torch.autograd.grad(out, inputs, retain_graph=keep, allow_unused=True)

    step(True)
    assert peak_bytes(lambda: step(True)) - peak_bytes(lambda: step(False)) > 0.8 * min(streams, weights)


def test_products_with_shared_weights_never_stand_in_memory_as_a_whole():
    M, d, width, rows = 4, 100, 64, 200
    x, scenario = torch.randn(rows, d), torch.randint(M, (rows,))
    own, shared, bias = torch.randn(M, d, width), torch.randn(d, width), torch.randn(M, width)

    def forward():
        return saml_kernels.grouped_mlp(x, scenario, [own], [bias], shared_weights=[shared], backend="cpp")

    with torch.no_grad():
        outputs = rows * width * 4
        assert bytes_allocated(forward) < outputs + own.numel() * 4 / 2
    for tensor in (own, shared):
        tensor.requires_grad_()
    out = forward()
    gradients, preact = (own.numel() + shared.numel() + bias.numel()) * 4, rows * width * 4
    # The cotangent of a sum is one number, which backward widens.
    assert bytes_allocated(out.sum().backward) < gradients + 2 * preact + own.numel() * 4 / 2


@pytest.mark.parametrize(("rows", "laid_out"), [(10, False), (200, True)])
def test_backward_of_experts_lays_the_transposes_out_where_enough_rows_read_them(rows, laid_out, capability):
    K, d, width = 3, 100, 64
    x, weight, bias = torch.randn(rows, d), torch.randn(K, d, width), torch.randn(K, width)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = saml_kernels.expert_outputs(x, [weight], [bias], backend="cpp")
    cotangent = torch.randn_like(out)
    allocated = bytes_allocated(lambda: torch.autograd.grad(out, inputs, cotangent))
    needed = sum(tensor.numel() for tensor in (*inputs, out)) * 4
    assert (allocated - needed > weight.numel() * 4 * 0.9) == laid_out, (allocated, needed)


def test_streams_of_all_branches_are_kept_for_backward_only():
    B, M, d = 500, 16, 64
    case = Case(M=M, B=B, hidden_dims=(d, 4), aux_dims=(4, 4))
    problem = make(case).to(torch.float32).leaves()
    streams = B * M * d * 4

    def forward(**options):
        return problem.run(backend="cpp", **options)

    with torch.no_grad():
        assert bytes_allocated(forward) < streams / 2
    with torch.inference_mode():
        assert bytes_allocated(forward) < streams / 2
    assert bytes_allocated(lambda: forward(recompute=True)) < streams / 2
    assert bytes_allocated(lambda: forward(recompute=False)) > streams
    out = forward(recompute=True).own.sum()
    assert bytes_allocated(out.backward) < streams / 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode):
    problem = make(SEVERAL_TILES[1]).to(torch.float32).leaves()
    trained = problem.run(backend="cpp", return_scores=True)
    with mode():
        out = problem.run(backend="cpp", return_scores=True)
    assert trained.own.requires_grad
    assert not out.own.requires_grad
    for a, b in zip((out.own, out.aux, *out.scores[:2]), (trained.own, trained.aux, *trained.scores[:2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float16, torch.float32), (torch.bfloat16,) * 2],
)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_layers_save_is_in_bfloat16_where_they_are(activation, dtype, stored, capability):
    """Apart from scores and pre-activations, which stay as they are computed."""
    B, M, widths = 37, 3, (50, 40, 30, 20)
    case = Case(M=M, B=B, hidden_dims=widths[:2], aux_dims=widths[2:], activation=activation)
    computed, found = torch.promote_types(dtype, torch.float32), {}

    def pack(tensor):
        found.setdefault(tuple(tensor.shape), set()).add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make(case).to(dtype).leaves().run(backend="cpp", recompute=False)
    assert found[B, M, widths[0]] == {stored}
    assert found[B, M] == {computed}
    for width in widths:
        assert found[B, width] == ({stored} if activation == "relu" else {stored, computed})
