"""The Triton kernels on a GPU. Written without one: not yet run.

pytest -m gpu -n 4        a test that takes too long ends its process, and with pytest-xdist the others go on
"""

import dataclasses

import plain
import problems
import pytest
import torch
from problems import ACTIVATIONS, Case, assert_close, errors, make

import saml_kernels
from on_gpu.sections import count_kernels
from on_gpu.target import Target
from saml_kernels.backends.triton import availability

pytest_plugins = ("on_gpu.limits",)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("time_limit"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEDULES = ("persistent", "per_layer")
CASES = [
    Case(M=1, B=600, local_dim=65, global_dim=100, hidden_dims=(65, 130), aux_dims=(47, 98)),
    Case(M=3, B=1000, local_dim=37, global_dim=19, hidden_dims=(49, 33), aux_dims=(35, 17), mutual_layers=(1, 2)),
    Case(M=8, B=777, hidden_dims=(64, 32, 16), aux_dims=(64, 32, 16), score="softmax", per_branch=True),
    Case(M=64, B=500, hidden_dims=(17, 8), aux_dims=(5, 6), gate="scalar"),
    Case(M=7, B=300, hidden_dims=(17, 16), aux_dims=(3, 2), mutual_layers=()),
]
CASES = [dataclasses.replace(case, activation=ACTIVATIONS[i], seed=i) for i, case in enumerate(CASES)]
# Widths that are multiples of every tile, more tiles than programs, and most rows in one scenario.
WIDE = Case(M=8, B=20_000, local_dim=128, global_dim=128, hidden_dims=(256, 128), aux_dims=(256, 128))
TOLERANCE = {True: 2e-3, False: 1e-5}
"""float32, by torch.backends.cuda.matmul.allow_tf32."""
FOREIGN_TOLERANCE = {torch.bfloat16: 1e-3, torch.int8: 1e-3, torch.float8_e4m3fn: 1e-2}
"""float32 own streams: a value on the edge between two rounded ones may fall on either side, and what multiplies float8
may add up with fewer bits than float32 has."""


def run(problem, **options):
    moved = problem.to(problem.x_global.dtype, "cuda")
    return problems.with_gradients(lambda p: p.run(backend="triton", return_scores=True, **options), moved)


def plainly(problem, dtype=torch.float64):
    """The plain formulation in torch's own products, on the GPU: in float64 the oracle, else the yardstick."""
    options = {name: value for name, value in problem.options.items() if name != "foreign_dtype"}
    return problems.with_gradients(
        lambda p: plain.multi_branch(p.x_local, p.x_global, p.scenario, p.params, **options), problem.to(dtype, "cuda")
    )


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["ieee", "tf32"])
def tf32(request):
    # monkeypatch would delete the switch, which is no attribute of its module's dict.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


# Recomputing changes the backward, the schedule the forward: together they are covered in two combinations.
@pytest.mark.parametrize(("schedule", "recompute"), [("persistent", True), ("per_layer", False)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, tf32, schedule, recompute):
    problem = make(case)
    out, exact = run(problem.to(torch.float32), schedule=schedule, recompute=recompute), plainly(problem)
    # tf32 may take a relu's argument near 0 to the other side, which plain torch does as well.
    yardstick = errors(plainly(problem, torch.float32), exact) if tf32 else dict.fromkeys(exact, 0.0)
    wrong = {
        name: (error, yardstick[name])
        for name, error in errors(out, exact).items()
        if not error <= max(TOLERANCE[tf32], 2 * yardstick[name])
    }
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, WIDE], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(case, dtype, schedule):
    problem = make(case).to(dtype)
    exact = plainly(problem)
    yardstick = errors(plainly(problem, dtype), exact)
    out = errors(run(problem, schedule=schedule), exact)
    assert not {name: (error, yardstick[name]) for name, error in out.items() if not error <= 2 * yardstick[name]}


@pytest.mark.parametrize("foreign_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_rounded_foreign_streams(case, foreign_dtype):
    if foreign_dtype == torch.float8_e4m3fn and (reason := availability.float8_reason(torch.device("cuda"))):
        pytest.skip(reason)
    # A kink or a tie of the rounding that the two take differently would be no error: smooth δ, and own outputs.
    rounded = make(dataclasses.replace(case, foreign_dtype=foreign_dtype, activation="silu"))
    exact = problems.with_gradients(lambda p: p.run(backend="reference", return_scores=True), rounded)
    assert_close(run(rounded.to(torch.float32)), exact, FOREIGN_TOLERANCE[foreign_dtype])


@pytest.mark.parametrize("foreign_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_rounded_foreign_streams_of_bfloat16_own_ones(foreign_dtype):
    if foreign_dtype == torch.float8_e4m3fn and (reason := availability.float8_reason(torch.device("cuda"))):
        pytest.skip(reason)
    problem = make(dataclasses.replace(WIDE, B=3000, foreign_dtype=foreign_dtype, activation="silu"))
    low = problem.to(torch.bfloat16, "cuda")

    def reference(dtype):
        return problems.with_gradients(lambda p: p.run(backend="reference", return_scores=True), low.to(dtype, "cuda"))

    exact = reference(torch.float64)
    yardstick, out = errors(reference(torch.bfloat16), exact), errors(run(low), exact)
    assert not {name: (error, yardstick[name]) for name, error in out.items() if not error <= 2 * yardstick[name]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, WIDE], ids=str)
def test_the_same_bits_from_run_to_run(case, dtype, schedule):
    problem = make(case).to(dtype)
    first = run(problem, schedule=schedule)
    for _ in range(5):
        again = run(problem, schedule=schedule)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_both_forms_give_the_same_results():
    """Two compilations may add in another order, and bfloat16 keeps 8 bits of what they give."""
    problem = make(WIDE).to(torch.bfloat16)
    persistent, per_layer = (run(problem, schedule=schedule) for schedule in SCHEDULES)
    assert_close(persistent, per_layer, 1e-2)


@pytest.mark.parametrize("rows", [0, 1, 129])
def test_skewed_and_absent_scenarios(rows, schedule):
    """Rows all in one scenario, and an empty batch."""
    problem = make(dataclasses.replace(CASES[1], B=rows))
    problem = dataclasses.replace(problem, scenario=torch.full_like(problem.scenario, 2))
    assert_close(run(problem.to(torch.float32), schedule=schedule), plainly(problem), TOLERANCE[False])


def captured(step):
    """step as a CUDA graph, and what a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_cuda_graph(case, schedule):
    """Forward and backward, captured and replayed on other inputs: nothing waits for the device."""
    problem = make(case).to(torch.float32, "cuda").leaves()
    out = problem.run(backend="triton", schedule=schedule)
    cotangents = [torch.randn_like(out.own), torch.randn_like(out.aux)]
    leaves = [tensor for _, tensor in problem.named()]

    def step():
        out = problem.run(backend="triton", schedule=schedule)
        return out.own, *torch.autograd.grad((out.own, out.aux), leaves, cotangents)

    graph, results = captured(step)
    for _ in range(3):
        with torch.no_grad():
            problem.x_global.normal_()
            problem.scenario.copy_(problem.scenario.roll(7))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.parametrize(
    ("schedule", "foreign_dtype"), [("persistent", None), ("per_layer", None), ("per_layer", torch.int8)], ids=str
)
def test_training_in_a_cuda_graph(schedule, foreign_dtype):
    """Steps of SGD replayed from a graph end at the very parameters that eager steps end at.

    Rounded weights are rounded again within the graph: a replay must not go on with those of the first step.
    """
    start = make(dataclasses.replace(CASES[1], foreign_dtype=foreign_dtype)).to(torch.float32, "cuda")
    rate, steps = 1e-3, 6

    def trainer():
        problem = start.map(torch.clone).leaves()
        leaves = [tensor for name, tensor in problem.named() if not name.startswith("x_")]

        def step():
            out = problem.run(backend="triton", schedule=schedule)
            gradients = torch.autograd.grad(out.own.square().mean() + out.aux.square().mean(), leaves)
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.sub_(gradient, alpha=rate)
            return out.own

        return step, leaves

    step, expected = trainer()
    for _ in range(steps):
        step()
    replayed, leaves = trainer()
    graph, _ = captured(replayed)
    # Three steps warmed up, and capturing took none.
    for _ in range(steps - 3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(leaves, expected, strict=True))
    parameters = [tensor for name, tensor in start.named() if not name.startswith("x_")]
    assert not any(torch.equal(a, b) for a, b in zip(leaves, parameters, strict=True))


def kernels(case, schedule, dtype=torch.bfloat16):
    """What the device runs, by name: in inference, in a training forward, in its backward."""
    problem = make(case).to(dtype, "cuda").leaves()
    leaves = [tensor for _, tensor in problem.named()]

    def infer():
        with torch.inference_mode():
            return problem.run(backend="triton", schedule=schedule)

    def backward(out):
        return torch.autograd.grad((out.own.sum(), out.aux.sum()), leaves)

    infer()
    backward(problem.run(backend="triton", schedule=schedule))
    target = Target(dry_run=False)
    inference, _ = count_kernels(target, infer)
    forward, out = count_kernels(target, lambda: problem.run(backend="triton", schedule=schedule))
    cotangents = torch.randn_like(out.own), torch.randn_like(out.aux)
    torch.cuda.synchronize()
    gradients, _ = count_kernels(target, lambda: torch.autograd.grad((out.own, out.aux), leaves, cotangents))
    return inference, forward, gradients


SHAPES = [
    Case(M=M, B=B, local_dim=32, global_dim=32, hidden_dims=widths, aux_dims=widths, mutual_layers=(1,))
    for M, B, widths in (
        (2, 64, (64, 32)),
        (32, 64, (64, 32)),
        (4, 5000, (64, 32)),
        (4, 300, (64,)),
        (4, 300, (64, 32, 32, 16)),
    )
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize(("schedule", "expected"), [("persistent", (2, 2, 2)), ("per_layer", (4, 4, 2))])
def test_kernels_depend_on_no_shape(case, schedule, expected):
    """By the profiler: one to group, the forward's; one for the chain of input gradients, one for all weights."""
    counts = kernels(case, schedule)
    assert tuple(count.total() for count in counts) == expected, counts


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
