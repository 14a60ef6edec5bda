"""The compiled CPU kernels on every instruction set.

Parity over layouts, options and sizes runs in the tests of the operations, over every backend.
"""

import dataclasses
import functools

import problems
import pytest
import torch
from cpp_runs import CAPABILITIES, CPP_ONLY, TOLERANCE, VARIABLE, assert_identical, run
from problems import Case, assert_close, batched_oracle, errors, make, with_gradients

import saml_kernels
from saml_kernels.activations import ACTIVATIONS

pytestmark = CPP_ONLY

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


# Below 25 rows a weight is read where it stands, from 1152 on those of three scenarios are laid out.
@pytest.mark.parametrize("rows", [1, 8, 203, 1400])
@pytest.mark.parametrize("widths", [(17, 33, 1), (47, 100, 130), (9, 200, 33)], ids=str)
@pytest.mark.parametrize("with_shared", [False, True], ids=["weights", "products"])
def test_parity_of_the_grouped_mlp(with_shared, widths, rows, capability):
    case = Case(M=3, B=rows, local_dim=widths[0], hidden_dims=widths[1:], aux_dims=(1, 1), mutual_layers=())
    problem = make(case)
    weights = [w[:, :-1].contiguous() for w in problem.params.branch_weights]
    generator = torch.Generator().manual_seed(2)
    shared = [1 + torch.randn(w.shape[1:], generator=generator).to(w.dtype) for w in weights] if with_shared else []

    def gradients(backend, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (problem.x_local, *weights, *shared)]
        biases = [b.to(dtype) for b in problem.params.branch_biases]
        options = {"output_activation": "identity", "shared_weights": leaves[3:], "backend": backend}
        out = saml_kernels.grouped_mlp(leaves[0], problem.scenario, leaves[1:3], biases, **options)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = (out, *torch.autograd.grad(out, leaves, cotangent))
        return dict(zip(("out", "dx", "dw1", "dw2", "ds1", "ds2"), results, strict=False))

    exact = gradients("reference", torch.float64)
    for dtype, tolerance in TOLERANCE.items():
        assert_close(gradients("cpp", dtype), exact, tolerance)


@pytest.mark.parametrize("score", ["ratio", "softmax"])
def test_cosines_of_one_feature_have_no_slope(score, capability):
    """They are 1 or -1 whatever the streams are: terms a thousand times the gradient cancel, and leave nothing."""
    generator = torch.Generator().manual_seed(3)
    B, M = 40, 5
    v = 1 + torch.rand(B, M, 1, generator=generator)
    scenario = torch.randint(M, (B,), generator=generator)
    v[torch.arange(B), scenario] *= 1e-3
    weight, bias = torch.randn(M, 1, 1, generator=generator), torch.randn(M, 1, generator=generator)

    def gradient(dtype, backend):
        leaf = v.to(dtype).requires_grad_()
        gate = weight.to(dtype), bias.to(dtype)
        out = saml_kernels.mutual_unit(leaf, scenario, *gate, score=score, temperature=0.1, backend=backend)
        return torch.autograd.grad(out.sum(), leaf)

    assert_close(
        dict(enumerate(gradient(torch.float32, "cpp"))), dict(enumerate(gradient(torch.float64, "reference"))), 1e-6
    )


LOW_PRECISION = [
    Case(M=4, B=140, local_dim=33, global_dim=17, hidden_dims=(33, 47), aux_dims=(17, 33)),
    Case(M=3, B=140, hidden_dims=(17, 33, 16), aux_dims=(33, 1, 7), mutual_layers=(1, 2), per_branch=True),
    Case(M=2, B=140, local_dim=1, hidden_dims=(16, 17), aux_dims=(16, 5), mutual_layers=(2,), activation="gelu"),
    Case(M=3, B=400, local_dim=37, global_dim=19, hidden_dims=(49, 33), aux_dims=(35, 17), mutual_layers=(1, 2)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_foreign_dtype(case, dtype, capability):
    rounded = make(dataclasses.replace(case, foreign_dtype=dtype))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mutual", [(1,), (2,), (1, 2)], ids=str)
def test_every_activation_in_16_bits(mutual, activation, dtype, capability):
    """Some are computed with the sums of a product, some from them, and streams are rounded in either."""
    case = Case(M=3, B=140, hidden_dims=(48, 33), aux_dims=(16, 16), mutual_layers=mutual, activation=activation)
    problem = make(case).to(dtype)
    exact = batched_oracle(problem)
    out = run(problem)
    assert errors(out, exact)["own"] < 2e-2
    with torch.no_grad():
        assert torch.equal(problem.run(backend="cpp")[0], out["own"])
    assert_identical(run(problem, recompute=True), run(problem, recompute=False))


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
