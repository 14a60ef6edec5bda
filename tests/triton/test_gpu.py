"""The Triton kernels on a GPU. Written without one: not yet run."""

import dataclasses

import problems
import pytest
import torch
from problems import ACTIVATIONS, Case, assert_close, batched_oracle, errors, make

import saml_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CASES = [
    Case(M=1, B=600, local_dim=65, global_dim=100, hidden_dims=(65, 130), aux_dims=(47, 98)),
    Case(M=3, B=1000, local_dim=37, global_dim=19, hidden_dims=(49, 33), aux_dims=(35, 17), mutual_layers=(1, 2)),
    Case(M=8, B=777, hidden_dims=(64, 32, 16), aux_dims=(64, 32, 16), score="softmax", per_branch=True),
    Case(M=64, B=500, hidden_dims=(17, 8), aux_dims=(5, 6), gate="scalar"),
    Case(M=7, B=300, hidden_dims=(17, 16), aux_dims=(3, 2), mutual_layers=()),
]
CASES = [dataclasses.replace(case, activation=ACTIVATIONS[i], seed=i) for i, case in enumerate(CASES)]
TOLERANCE = {True: 2e-3, False: 1e-5}
"""float32, by torch.backends.cuda.matmul.allow_tf32."""


def run(problem, **options):
    moved = problem.to(problem.x_global.dtype, "cuda")
    return problems.with_gradients(lambda p: p.run(backend="triton", return_scores=True, **options), moved)


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", request.param)
    return request.param


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, tf32, recompute):
    problem = make(case)
    assert_close(run(problem.to(torch.float32), recompute=recompute), batched_oracle(problem), TOLERANCE[tf32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(case, dtype):
    problem = make(case).to(dtype)
    exact = batched_oracle(problem)
    plain = errors(batched_oracle(problem, dtype), exact)
    out = errors(run(problem), exact)
    assert not {name: (error, plain[name]) for name, error in out.items() if not error <= 2 * plain[name]}


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_foreign_bfloat16(case):
    rounded = make(dataclasses.replace(case, foreign_dtype=torch.bfloat16))
    exact = problems.with_gradients(lambda p: p.run(backend="reference", return_scores=True), rounded)
    assert_close(run(rounded.to(torch.float32)), exact, 1e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_from_run_to_run(case):
    problem = make(case).to(torch.float32)
    first, second = run(problem), run(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_cuda_graph(case):
    """Forward and backward, captured and replayed on other inputs: nothing waits for the device."""
    problem = make(case).to(torch.float32, "cuda").leaves()
    cotangents = [torch.randn_like(y) for y in (lambda out: (out.own, out.aux))(problem.run(backend="triton"))]
    leaves = [tensor for _, tensor in problem.named()]

    def step():
        out = problem.run(backend="triton")
        return out.own, *torch.autograd.grad((out.own, out.aux), leaves, cotangents)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        problem.x_global.normal_()
        problem.scenario.copy_(problem.scenario.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_offsets_beyond_two_to_the_31():
    """Streams of 2.4e9 elements: an address in 32 bits would wrap."""
    M, B, d = 64, 75_000, 512
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    v = torch.randn(B, M, d, generator=generator, device="cuda", dtype=torch.bfloat16)
    scenario = torch.randint(M, (B,), generator=generator, device="cuda")
    weight = torch.zeros(M, d, 1, device="cuda", dtype=torch.bfloat16)
    bias = torch.zeros(M, 1, device="cuda", dtype=torch.bfloat16)
    out = saml_kernels.mutual_unit(v, scenario, weight, bias, score="softmax", backend="triton")
    last = slice(B - 50, B)
    expected = saml_kernels.mutual_unit(v[last], scenario[last], weight, bias, score="softmax", backend="reference")
    assert_close({"out": out[last]}, {"out": expected}, 1e-2)
