"""The compiled CPU kernels: every instruction set, any number of threads, what they allocate, what they refuse.

Parity over layouts, options and sizes runs in the tests of the operations, over every backend.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import problems
import pytest
import torch
from problems import FLOAT32_TOLERANCE, Case, assert_close, batched_oracle, errors, make, with_gradients
from torch.utils.data import DataLoader, Dataset

import saml_kernels
from saml_kernels import extension
from saml_kernels.backends import cpp, reference
from saml_kernels.layers import MultiBranchMLP

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(extension.EXTENSION_MISSING is not None, reason=str(extension.EXTENSION_MISSING)),
]

VARIABLE = "SAML_KERNELS_CPU_CAPABILITY"
INFO = extension.build_info()
CAPABILITIES = [] if INFO is None else INFO["cpu_capabilities"]
# Judged against sums in another order: the ratio divides by a sum of cosines, which costs a digit or two.
TOLERANCE = {torch.float32: FLOAT32_TOLERANCE, torch.float64: 1e-12}


@pytest.fixture(params=CAPABILITIES)
def capability(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def run(problem, **options):
    options = {"backend": "cpp", "return_scores": True} | options
    return with_gradients(lambda p: p.run(**options), problem)


def assert_identical(out, ref):
    assert out.keys() == ref.keys()
    different = [name for name in ref if not torch.equal(out[name], ref[name])]
    assert not different


# --- instruction sets -----------------------------------------------------------------------------------------------

# Odd widths leave a remainder in every vector, panel and register tile; B in several tiles, the last one short.
CASES = [
    Case(M=1, B=30, local_dim=5, global_dim=3, hidden_dims=(17, 33), aux_dims=(9, 1), activation="relu"),
    Case(M=2, B=101, local_dim=33, hidden_dims=(33, 47), aux_dims=(47, 17), mutual_layers=(2,), per_branch=True),
    Case(M=3, hidden_dims=(47, 17, 1), aux_dims=(17, 1, 33), mutual_layers=(1, 2), gate="scalar", score="softmax"),
    Case(M=5, hidden_dims=(1, 33), aux_dims=(33, 7), score="softmax", temperature=0.5),
    Case(M=8, hidden_dims=(17, 47), aux_dims=(1, 17), mutual_layers=(1, 2), gate="scalar"),
    Case(M=64, B=130, hidden_dims=(17, 8), aux_dims=(5, 6)),
    Case(M=7, B=100, local_dim=47, hidden_dims=(17, 16), aux_dims=(33, 32), mutual_layers=()),
    Case(M=4, hidden_dims=(16, 33, 17), aux_dims=(32, 17, 1), mutual_layers=(1, 2, 3), per_branch=True),
    Case(M=3, hidden_dims=(33, 17, 47), aux_dims=(17, 33, 5), mutual_layers=(1, 3), score="softmax"),
    # More than one item of a weight gradient, more rows than it packs at a time, more than one scalar tile.
    Case(M=1, B=600, local_dim=65, global_dim=100, hidden_dims=(65, 130), aux_dims=(47, 98)),
    # Enough rows of every scenario to lay out all weights, backward's too.
    Case(M=3, B=400, local_dim=37, global_dim=19, hidden_dims=(49, 33), aux_dims=(35, 17), mutual_layers=(1, 2)),
    Case(M=2, B=500, local_dim=8, global_dim=40, hidden_dims=(32, 100, 7), aux_dims=(64, 9, 16), per_branch=True),
]
CASES = [
    dataclasses.replace(case, B=max(case.B, 61), activation=problems.ACTIVATIONS[i % len(problems.ACTIVATIONS)], seed=i)
    for i, case in enumerate(CASES)
]


@functools.cache
def expected(case):
    return batched_oracle(make(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype, capability):
    assert_close(run(make(case).to(dtype)), expected(case), TOLERANCE[dtype])


@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
def test_parity_of_every_activation(activation, capability):
    # Wide ranges of δ's argument, past where tanh and the exponential saturate.
    case = Case(M=3, B=70, local_dim=17, hidden_dims=(33, 17), aux_dims=(17, 9), activation=activation)
    problem = make(case)
    problem.x_local.mul_(torch.logspace(-3, 1, case.B, dtype=torch.float64)[:, None])
    problem = problem.map(lambda t: t.float().double())
    for dtype, tolerance in TOLERANCE.items():
        assert_close(run(problem.to(dtype)), batched_oracle(problem), tolerance)


@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("score", ["ratio", "softmax"])
@pytest.mark.parametrize(("M", "d"), [(1, 17), (2, 33), (7, 47), (64, 16)])
def test_parity_of_the_mutual_unit(M, d, score, gate, capability):
    case = Case(M=M, B=90, local_dim=d, hidden_dims=(d,), aux_dims=(1,), gate=gate, per_branch=True, seed=M)
    problem = make(case)
    weight, bias = problem.params.gate_weights[0], problem.params.gate_biases[0]
    v = 0.5 + problem.x_local

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (v, weight, bias)]
        out, alpha = saml_kernels.mutual_unit(
            leaves[0], problem.scenario, *leaves[1:], score=score, backend=backend, return_scores=True
        )
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        names = ("out", "alpha", "dv", "dweight", "dbias")
        return dict(zip(names, (out, alpha, *torch.autograd.grad(out, leaves, cotangent)), strict=True))

    exact = gradients("reference", torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_close(gradients("cpp", dtype), exact, tolerance)


@pytest.mark.parametrize("rows", [203, 1400])  # From 1152 rows on the weights of three scenarios are laid out.
@pytest.mark.parametrize("widths", [(17, 33, 1), (47, 100, 130)], ids=str)
def test_parity_of_the_grouped_mlp(widths, rows, capability):
    case = Case(M=3, B=rows, local_dim=widths[0], hidden_dims=widths[1:], aux_dims=(1, 1), mutual_layers=())
    problem = make(case)
    weights = [w[:, :-1].contiguous() for w in problem.params.branch_weights]

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (problem.x_local, *weights)]
        biases = [b.to(dtype) for b in problem.params.branch_biases]
        out = saml_kernels.grouped_mlp(
            leaves[0], problem.scenario, leaves[1:], biases, output_activation="identity", backend=backend
        )
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = (out, *torch.autograd.grad(out, leaves, cotangent))
        return dict(zip(("out", "dx", "dw1", "dw2"), results, strict=True))

    exact = gradients("reference", torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_close(gradients("cpp", dtype), exact, tolerance)


LOW_PRECISION = [
    Case(M=4, B=140, local_dim=33, global_dim=17, hidden_dims=(33, 47), aux_dims=(17, 33)),
    Case(M=3, B=140, hidden_dims=(17, 33, 16), aux_dims=(33, 1, 7), mutual_layers=(1, 2), per_branch=True),
    Case(M=2, B=140, local_dim=1, hidden_dims=(16, 17), aux_dims=(16, 5), mutual_layers=(2,), activation="gelu"),
    Case(M=3, B=400, local_dim=37, global_dim=19, hidden_dims=(49, 33), aux_dims=(35, 17), mutual_layers=(1, 2)),
]


@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_foreign_bfloat16(case, capability):
    rounded = make(dataclasses.replace(case, foreign_dtype=torch.bfloat16))
    exact = with_gradients(lambda p: p.run(backend="reference", return_scores=True), rounded)
    out, full = run(rounded.to(torch.float32)), run(make(case).to(torch.float32))
    # A float32 stream beside a rounding boundary falls to the other side of it here and there.
    assert_close(out, exact, 1e-3)
    assert torch.equal(out["aux"], full["aux"])
    assert 0 < errors(out, full)["own"] < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(case, dtype, capability):
    problem = make(case).to(dtype)
    exact = batched_oracle(problem)
    plain = errors(batched_oracle(problem, dtype), exact)
    out = run(problem)
    assert out["own"].dtype == out["aux"].dtype == out["∂x_local"].dtype == dtype
    wrong = {name: (error, plain[name]) for name, error in errors(out, exact).items() if not error <= 2 * plain[name]}
    assert not wrong


@pytest.mark.skipif(len(CAPABILITIES) < 2, reason="one instruction set only")
def test_the_variable_chooses_the_instruction_set(monkeypatch):
    """Cosines are summed in as many parts as a vector has lanes, so the last bits tell the vectors apart."""
    problem = make(Case(M=8, B=200, hidden_dims=(100, 4)))
    best = run(problem)
    for name in ("", CAPABILITIES[0]):
        monkeypatch.setenv(VARIABLE, name)
        assert_identical(run(problem), best)
    monkeypatch.setenv(VARIABLE, "baseline")
    assert not torch.equal(run(problem)["scores[1]"], best["scores[1]"])


@pytest.mark.parametrize("wrong", ["avx1024", "AVX2", "baseline "])
def test_unknown_instruction_set(wrong, monkeypatch):
    problem = make(Case())
    monkeypatch.setenv(VARIABLE, wrong)
    with pytest.raises(ValueError, match=f"{VARIABLE} must be one of {', '.join(CAPABILITIES)} .*got {wrong}"):
        problem.run(backend="cpp")


# --- threads --------------------------------------------------------------------------------------------------------

SEVERAL_TILES = [
    Case(M=5, B=1003, local_dim=33, hidden_dims=(33, 17), aux_dims=(17, 9), activation="relu"),
    Case(M=3, B=1003, hidden_dims=(17, 33, 5), aux_dims=(9, 7, 5), mutual_layers=(1, 2), activation="gelu"),
    Case(M=4, B=1003, hidden_dims=(33, 17), aux_dims=(9, 7), per_branch=True, foreign_dtype=torch.bfloat16),
    Case(M=6, B=1003, hidden_dims=(17, 9), aux_dims=(9, 7), mutual_layers=()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SEVERAL_TILES, ids=str)
def test_results_are_the_same_bits(case, dtype, keep_num_threads):
    """Whatever the number of threads, from run to run, and with the streams computed again."""
    problem = make(case).to(dtype)
    torch.set_num_threads(1)
    once = run(problem, recompute=False)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for recompute in (False, True):
            assert_identical(run(problem, recompute=recompute), once)


NUM_THREADS = """
import os
import torch
from saml_kernels import extension
torch.set_num_threads(3)
streams, weight = torch.randn(500, 2, 8), torch.randn(2, 8, 8)
permutation, offsets = torch.arange(500), torch.tensor([0, 250, 500])
before = len(os.listdir("/proc/self/task"))
torch.ops.saml_kernels.mutual_forward(streams, permutation, offsets, weight, weight[0], 0, 1.0, False)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to count threads")
def test_the_threads_of_torch_are_used():
    """An extension compiled without OpenMP runs at::parallel_for on one thread, silently."""
    result = subprocess.run([sys.executable, "-c", NUM_THREADS], capture_output=True, text=True, check=True)
    assert int(result.stdout) == 2


def test_calls_from_several_python_threads():
    inputs = [make(case).to(torch.float32) for case in SEVERAL_TILES]
    alone = [run(problem) for problem in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs * 4))
    for out, ref in zip(together, alone * 4, strict=True):
        assert_identical(out, ref)


class Outputs(Dataset):
    def __init__(self, problem):
        self.problem = problem

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return run(self.problem)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_inside_a_forked_data_loader_worker(keep_num_threads):
    torch.set_num_threads(2)
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    here = run(problem)
    loader = DataLoader(Outputs(problem), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    (there,) = loader
    assert_identical(there, here)


# --- what is computed and kept --------------------------------------------------------------------------------------


def bytes_allocated(function):
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return sum(max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profile.key_averages())


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


TRAINED = Case(activation="tanh", mutual_layers=(1, 2))
NAMES = [name for name, _ in make(TRAINED).named()]


def gradient_of(problem, names, backend, second=False):
    """Gradients of what requires one, and nothing anywhere else."""
    leaves = problem.map(lambda t: t.clone())
    tensors = dict(leaves.named())
    wanted = [tensors[name].requires_grad_() for name in names]
    out = leaves.run(backend=backend)
    total = out.own.square().sum() + out.aux.square().sum()
    if second:
        first = torch.autograd.grad(total, wanted, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
    total.backward()
    assert all(tensor.grad is None for name, tensor in tensors.items() if name not in names)
    return {name: tensor.grad for name, tensor in zip(names, wanted, strict=True)}


@pytest.mark.parametrize("only", NAMES)
def test_only_one_tensor_requires_a_gradient(only):
    problem = make(TRAINED)
    everything = gradient_of(problem, NAMES, "cpp")
    assert torch.equal(gradient_of(problem, [only], "cpp")[only], everything[only])
    assert_close(
        gradient_of(problem, [only], "cpp", second=True), gradient_of(problem, [only], "reference", second=True), 1e-10
    )


def test_nothing_requires_a_gradient():
    out = make(TRAINED).run(backend="cpp")
    assert not out.own.requires_grad
    assert not out.aux.requires_grad


def test_double_backward_is_the_references():
    problem = make(TRAINED)
    out = gradient_of(problem, NAMES, "cpp", second=True)
    assert_close(out, gradient_of(problem, NAMES, "reference", second=True), 1e-10)


@pytest.mark.parametrize("operation", ["multi_branch", "grouped_mlp", "mutual_unit"])
def test_double_backward_where_inputs_are_computed_from_each_other(operation):
    """The gradient of one input must not go on through another, in the first derivative or the second."""
    torch.manual_seed(0)
    scenario = torch.arange(20) % 3
    trunk = MultiBranchMLP(3, 5, 4, (7, 2), activation="tanh", dtype=torch.float64)
    start = torch.randn(20, 3, 5, dtype=torch.float64)

    def function(x, backend):
        if operation == "multi_branch":
            trunk.backend = backend
            return trunk(x, x[:, 0, :4], scenario).own
        if operation == "grouped_mlp":
            return saml_kernels.grouped_mlp(
                x[:, 0], scenario, [x[:3, :1].mT], [x[:3, 0, :1]], activation="tanh", backend=backend
            )
        return saml_kernels.mutual_unit(x, scenario, x[:3].mean(1)[:, :, None], x[:3, 0, :1], backend=backend)

    results = []
    for backend in ("cpp", "reference"):
        x = start.clone().requires_grad_()
        out = function(x, backend)
        (plain,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append({"plain": plain, "first": first.detach(), "second": second})
    assert_close(*results, 1e-10)


# --- inputs ---------------------------------------------------------------------------------------------------------


def transposed(t):
    return t.mT.contiguous().mT if t.ndim >= 2 else t


def sliced(t):
    return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]


def expanded(t):
    return t[:1].expand_as(t) if t.shape[0] > 0 else t


@pytest.mark.parametrize("layout", [transposed, sliced, expanded])
@pytest.mark.parametrize("case", SEVERAL_TILES[1:3], ids=str)
def test_layout_does_not_show(case, layout):
    strided = make(case).to(torch.float32).map(layout)
    ids = torch.stack([strided.scenario, -strided.scenario], dim=1)[:, 0]
    out = run(dataclasses.replace(strided, scenario=ids))
    assert_identical(out, run(strided.map(lambda t: t.clone(memory_format=torch.contiguous_format))))


def test_layout_of_the_cotangent_does_not_show():
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    gradients = []
    for cotangent in (torch.ones(()).expand(1003, 17), torch.ones(1003, 17), torch.ones(17, 1003).t()):
        leaves = problem.leaves()
        gradients.append(torch.autograd.grad(leaves.run(backend="cpp").own, leaves.x_local, cotangent)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_id_type_does_not_show():
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    narrow = dataclasses.replace(problem, scenario=problem.scenario.int())
    assert_identical(run(narrow), run(problem))


@pytest.mark.parametrize("per_branch", [False, True], ids=["shared", "views"])
@pytest.mark.parametrize("foreign_dtype", [None, torch.bfloat16], ids=["full", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    # The auxiliary rows of a weight then start past the first slice of its gradient.
    [{"B": 0}, {"B": 1}, {"local_dim": 0, "aux_dims": (110, 3)}, {"global_dim": 0}, {"local_dim": 0, "global_dim": 0}],
    ids=str,
)
def test_empty_sizes(sizes, foreign_dtype, per_branch, capability):
    for mutual_layers in ((), (1,), (1, 2)):
        case = Case(mutual_layers=mutual_layers, per_branch=per_branch, foreign_dtype=foreign_dtype, **sizes)
        problem = make(case)
        ref = with_gradients(lambda p: p.run(backend="reference", return_scores=True), problem)
        assert_close(run(problem.to(torch.float32)), ref, FLOAT32_TOLERANCE if foreign_dtype is None else 1e-3)


@pytest.mark.parametrize("activation", problems.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["x_local", "foreign view", "x_global"])
def test_non_finite_inputs_stay_in_their_rows(field, value, activation, capability):
    case = Case(
        M=3,
        B=100,
        local_dim=17,
        hidden_dims=(17, 33),
        aux_dims=(9, 5),
        mutual_layers=(1, 2),
        activation=activation,
        per_branch=field == "foreign view",
    )
    clean = make(case).to(torch.float32)
    dirty = clean.map(lambda t: t.clone())
    row = 41
    if field == "foreign view":
        dirty.x_local[row, (clean.scenario[row] + 1) % case.M, 3] = value
    else:
        getattr(dirty, field)[row, 3] = value
    out, ref = run(dirty), run(clean)
    others = torch.arange(case.B) != row
    for name in ("own", "aux", "scores[1]", "scores[2]", "∂x_local", "∂x_global"):
        assert torch.equal(out[name][others], ref[name][others]), name
    if field != "x_global":
        assert torch.equal(out["aux"], ref["aux"])
    if value != value:
        assert out["own"][row].isnan().all()
        assert out["aux"][row].isnan().all() == (field == "x_global")
    # Of the parameters only those of the row's scenario, and the auxiliary network, can have met the value.
    for name in NAMES[2:]:
        if not name.startswith("aux"):
            elsewhere = torch.arange(case.M) != clean.scenario[row]
            assert torch.equal(out[f"∂{name}"][elsewhere], ref[f"∂{name}"][elsewhere]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", SEVERAL_TILES[1:], ids=str)
def test_nothing_reads_uninitialised_memory(case, recompute, dtype, capability, request):
    problem = make(dataclasses.replace(case, B=103)).to(dtype)
    clean = run(problem, recompute=recompute)
    request.getfixturevalue("poisoned_empty")
    out = run(problem, recompute=recompute)
    assert not any(tensor.isnan().any() for tensor in out.values())
    assert_identical(out, clean)


# --- choice of backend ----------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Which backend's functions ran, in order."""
    seen = []
    for backend in (cpp, reference):
        name = backend.__name__.rpartition(".")[2]
        for operation in ("multi_branch", "mutual_unit"):
            function = getattr(backend, operation)

            def spy(*arguments, _function=function, _name=name, **options):
                seen.append(_name)
                return _function(*arguments, **options)

            monkeypatch.setattr(backend, operation, spy)
    return seen


def test_auto_prefers_the_extension(calls):
    make(Case()).run(backend="auto")
    assert calls == ["cpp"]


@pytest.mark.parametrize(
    ("options", "dtype", "why"),
    [
        ({"stop_gradient": False}, torch.float32, "stop_gradient=False needs the reference"),
        ({"foreign_dtype": torch.int8}, torch.float32, "foreign_dtype .* got torch.int8"),
        ({"foreign_dtype": torch.float8_e4m3fn}, torch.float32, "foreign_dtype .* got torch.float8_e4m3fn"),
        ({"foreign_dtype": torch.bfloat16}, torch.float64, "foreign_dtype .* float64"),
    ],
    ids=str,
)
def test_what_it_refuses_the_reference_runs(options, dtype, why, calls):
    problem = make(Case()).to(dtype)
    with pytest.raises(saml_kernels.BackendUnavailable, match=f"backend 'cpp' cannot run multi_branch: .*{why}"):
        problem.run(backend="cpp", **options)
    assert calls == []
    out = problem.run(backend="auto", **options)
    assert calls == ["reference"]
    assert torch.equal(out.own, problem.run(backend="reference", **options).own)


def test_the_mutual_unit_without_stop_gradient_goes_to_the_reference(calls):
    v, scenario, weight, bias = torch.randn(6, 3, 4), torch.arange(6) % 3, torch.randn(3, 4, 4), torch.randn(3, 4)
    with pytest.raises(saml_kernels.BackendUnavailable, match="stop_gradient=False needs the reference"):
        saml_kernels.mutual_unit(v, scenario, weight, bias, stop_gradient=False, backend="cpp")
    saml_kernels.mutual_unit(v, scenario, weight, bias, stop_gradient=False)
    saml_kernels.mutual_unit(v, scenario, weight, bias)
    assert calls == ["reference", "cpp"]


def test_other_devices_are_refused():
    problem = make(Case()).to(torch.float32, "meta")
    with pytest.raises(saml_kernels.BackendUnavailable, match="multi_branch kernel for meta"):
        problem.run(backend="cpp")


@pytest.mark.parametrize("options", [{}, {"foreign_dtype": torch.bfloat16}], ids=["full", "bfloat16"])
def test_autocast(options, calls):
    problem = make(SEVERAL_TILES[0]).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = problem.leaves()
        out = leaves.run(**options)
    assert calls == ["cpp"]
    low = problem.to(torch.bfloat16)
    assert out.own.dtype == torch.bfloat16
    assert torch.equal(out.own, low.run(backend="cpp", **options).own)
    gradient = torch.autograd.grad(out.own.float().sum(), leaves.x_local)[0]
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
