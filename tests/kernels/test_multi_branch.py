"""multi_branch against the per-sample oracle: outputs, scores and every gradient, in every dtype and layout."""

import dataclasses
import functools

import exactness
import hypothesis
import naive
import problems
import pytest
import torch
from hypothesis import strategies as st
from problems import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    LAYOUTS,
    TRUNK_BACKENDS,
    Case,
    assert_close,
    batched_oracle,
    errors,
    kernel,
    laid_out,
    make,
    oracle,
    skip_unavailable,
    with_gradients,
)

import saml_kernels

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.parametrize("backend", TRUNK_BACKENDS)

SWEEP = problems.sweep()


@functools.cache
def expected(case):
    return oracle(make(case))


# --- parity ---------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_float64(case, backend):
    assert_close(kernel(make(case), backend), expected(case), FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_float32(case, backend):
    # Wider than the sweep: a gradient of one or two numbers may cancel, and then its relative error says nothing.
    wide = dataclasses.replace(
        case,
        B=48,
        local_dim=15,
        global_dim=9,
        hidden_dims=tuple(4 * d + 1 for d in case.hidden_dims),
        aux_dims=tuple(4 * a + 3 for a in case.aux_dims),
    )
    problem = make(wide).to(torch.float32)
    assert_close(kernel(problem, backend), batched_oracle(problem), FLOAT32_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(M=4, B=96, local_dim=24, global_dim=20, hidden_dims=(32, 16), aux_dims=(24, 16), mutual_layers=m)
        for m in [(1,), (1, 2)]
    ],
    ids=str,
)
def test_low_precision_errs_at_most_twice_as_much_as_plain_torch(case, dtype, backend):
    problem = make(case).to(dtype)
    exact, natural = batched_oracle(problem), batched_oracle(problem, dtype)
    out = kernel(problem, backend)
    assert out["own"].dtype == out["aux"].dtype == dtype
    plain_errors = errors(natural, exact)
    wrong = {k: (e, plain_errors[k]) for k, e in errors(out, exact).items() if not e <= 2 * plain_errors[k]}
    assert not wrong


@on_every_backend
@pytest.mark.parametrize(("B", "M"), [(257, 8), (63, 2), (1000, 5)])
def test_larger_sizes_against_plain_torch(B, M, backend):
    case = Case(M=M, B=B, local_dim=33, global_dim=17, hidden_dims=(40, 31), aux_dims=(24, 9), mutual_layers=(1, 2))
    problem = make(case)
    assert_close(kernel(problem, backend), batched_oracle(problem), FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("case", SWEEP[:: len(SWEEP) // 12], ids=str)
def test_nothing_reads_uninitialised_memory(case, backend, poisoned_empty):
    assert_close(kernel(make(case), backend), expected(case), FLOAT64_TOLERANCE)


# --- foreign streams in a lower precision ---------------------------------------------------------------------------

FOREIGN = [
    Case(M=4, foreign_dtype=dtype, mutual_layers=mutual, hidden_dims=(6, 5, 4), aux_dims=(5, 3, 3), **options)
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
    for mutual, options in [
        ((1,), {"activation": "relu"}),
        ((2,), {"activation": "gelu", "per_branch": True, "score": "softmax"}),
        ((1, 2), {"activation": "silu", "gate": "scalar"}),
        ((1, 3), {"activation": "tanh", "gate": "vector", "score": "softmax"}),
    ]
]


@on_every_backend
@pytest.mark.parametrize("case", FOREIGN, ids=str)
def test_foreign_dtype(case, backend):
    assert_close(kernel(make(case), backend), expected(case), FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("case", FOREIGN, ids=str)
def test_foreign_dtype_of_float32_inputs(case, backend):
    # In float32 a value next to a rounding boundary may fall to the other side, a whole step of the small type away
    # (2^-9 of bfloat16, 1/254 of int8, 2^-4 of float8); a step in one of ~10 summands of ~100 streams is under 1e-3.
    assert_close(kernel(make(case).to(torch.float32), backend), expected(case), 1e-3)


@on_every_backend
@pytest.mark.parametrize(
    ("dtype", "furthest"), [(torch.bfloat16, 2e-3), (torch.int8, 5e-3), (torch.float8_e4m3fn, 4e-2)]
)
def test_foreign_dtype_stays_near_full_precision(dtype, furthest, backend):
    case = Case(M=8, B=64, local_dim=32, global_dim=32, hidden_dims=(32, 16), aux_dims=(32, 16))
    rounded = dataclasses.replace(case, foreign_dtype=dtype)
    full, out = kernel(make(case), backend), kernel(make(rounded), backend)
    assert torch.equal(full["aux"], out["aux"])
    distance = errors(out, full)["own"]
    assert 0 < distance < furthest


@on_every_backend
@pytest.mark.parametrize(("dtype", "value"), exactness.NOT_FINITE_FOREIGN, ids=str)
def test_a_value_that_is_not_finite_is_not_rounded_to_one_that_is(dtype, value, backend):
    with skip_unavailable(backend):
        exactness.check_not_finite_foreign_values(dtype, value, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_foreign_dtype_of_zero_rows_and_columns(dtype, backend):
    """Nothing to scale: a row of dead inputs and a column of zero weights stay zeros."""
    problem = make(Case(M=4, mutual_layers=(1, 2), foreign_dtype=dtype))
    problem.x_local[:3] = 0.0
    problem.params.aux_biases[0][:] = -100.0
    problem.params.branch_weights[0][:, :, 2] = 0.0
    problem.params.gate_weights[0][1, :, 3] = 0.0
    assert_close(kernel(problem, backend), oracle(problem), FLOAT64_TOLERANCE)


@on_every_backend
@pytest.mark.parametrize("mutual_layers", [(), (1,)])
def test_foreign_dtype_without_foreign_work_changes_nothing(mutual_layers, backend):
    """No mutual layer, or one scenario: there is no foreign product to round."""
    case = Case(M=1 if mutual_layers else 3, mutual_layers=mutual_layers)
    rounded = dataclasses.replace(case, foreign_dtype=torch.int8)
    full, out = kernel(make(case), backend), kernel(make(rounded), backend)
    assert all(torch.equal(full[name], out[name]) for name in full)


# --- derivatives judged by finite differences -----------------------------------------------------------------------


def gradcheck(function, inputs, second=False):
    """gradcheck, in full or by random projections where `second` asks for the second derivative too."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=second)
    if second:
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


SMALL = {"B": 3, "local_dim": 2, "global_dim": 2, "hidden_dims": (3, 2), "aux_dims": (2, 2)}
# Finite differences see the function, not what stop-gradient hides; over all inputs at once they judge the
# cases where nothing is hidden: no stop-gradient, no mutual layer, or no foreign branch.
NOTHING_HIDDEN = [
    Case(**SMALL, stop_gradient=False, mutual_layers=(1,), activation="tanh"),
    Case(**SMALL, stop_gradient=False, mutual_layers=(1, 2), activation="gelu", gate="scalar", per_branch=True),
    Case(**SMALL, stop_gradient=False, mutual_layers=(2,), activation="silu", score="softmax", temperature=0.5),
    Case(**SMALL, stop_gradient=False, mutual_layers=(1, 2), activation="relu", score="softmax"),
    Case(**SMALL, mutual_layers=(), activation="gelu"),
    Case(**SMALL, mutual_layers=(), activation="leaky_relu", per_branch=False),
    Case(**SMALL, M=1, mutual_layers=(1,), activation="tanh"),
]


@on_every_backend
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("case", NOTHING_HIDDEN, ids=str)
def test_gradcheck_where_nothing_is_hidden(case, second, backend):
    problem = make(case)

    def function(*tensors):
        out = problem.holding(tensors).run(backend=backend)
        return out.own, out.aux

    with skip_unavailable(backend):
        gradcheck(function, [tensor for _, tensor in problem.named()], second)


@on_every_backend
@pytest.mark.parametrize(
    "case",
    [
        Case(**SMALL, per_branch=True, mutual_layers=(1,), activation="tanh", gate="vector"),
        Case(**SMALL, per_branch=True, mutual_layers=(1,), activation="gelu", score="softmax", gate="scalar"),
        Case(**SMALL, per_branch=True, mutual_layers=(2,), activation="silu", gate="vector"),
        Case(**SMALL, per_branch=True, mutual_layers=(2,), activation="tanh", score="softmax"),
    ],
    ids=str,
)
def test_gradcheck_of_what_only_the_own_branch_reads(case, backend):
    """With one mutual layer and one scenario in the batch, the foreign streams are constants of everything the own
    branch alone reads: its parameters, its view of x_local, and auxiliary layers above the mutual one. There the
    derivative under stop-gradient is the ordinary derivative, and finite differences judge it."""
    own, (mutual_layer,) = 1, case.mutual_layers
    problem = make(case)
    problem = dataclasses.replace(problem, scenario=torch.full_like(problem.scenario, own))
    full = dict(problem.named())

    def of_own_branch(name):
        return name == "x_local" or name.startswith(("branch", "gate"))

    above = [f"aux_{kind}[{i}]" for kind in ("weights", "biases") for i in range(mutual_layer + 1, 3)]
    names = [name for name in full if of_own_branch(name) or name in above]

    def branches_first(name, tensor):
        return tensor.transpose(0, 1) if name == "x_local" else tensor

    def function(*parts):
        tensors = dict(full)
        for name, part in zip(names, parts, strict=True):
            if of_own_branch(name):
                pieces = list(branches_first(name, full[name]).unbind(0))
                pieces[own] = part
                tensors[name] = branches_first(name, torch.stack(pieces))
            else:
                tensors[name] = part
        out = problem.holding(tensors.values()).run(backend=backend)
        return out.own, out.aux

    parts = [branches_first(n, full[n])[own] if of_own_branch(n) else full[n] for n in names]
    with skip_unavailable(backend):
        gradcheck(function, parts)


@on_every_backend
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        Case(mutual_layers=(1,), activation="tanh"),
        Case(mutual_layers=(2,), activation="relu", gate="scalar", per_branch=True),
        Case(mutual_layers=(1, 2), activation="gelu", score="softmax", temperature=0.5),
        Case(mutual_layers=(), activation="silu"),
    ],
    ids=str,
)
def test_second_derivative(case, stop_gradient, backend):
    """Double backward under stop-gradient differentiates the gradient with the foreign streams still constant."""
    problem = make(dataclasses.replace(case, stop_gradient=stop_gradient))
    out = kernel(problem, backend, retain=True)
    assert_close(out, oracle(problem, retain=True), 1e-9)


# --- degenerate scores ----------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("score", ["ratio", "softmax"])
@pytest.mark.parametrize("dead", ["own", "foreign", "all"])
def test_dead_branches(dead, score, backend):
    """A relu-dead branch is the zero vector: cosine 0, and no NaN from its norm on either way."""
    problem = make(Case(M=3, B=6, mutual_layers=(1, 2), score=score))
    problem = dataclasses.replace(problem, scenario=torch.tensor([0, 1, 2, 0, 1, 2]))
    branches = {"own": [0], "foreign": [1, 2], "all": [0, 1, 2]}[dead]
    problem.params.branch_biases[0][branches] = -100.0
    out = kernel(problem, backend)
    assert_close(out, oracle(problem), FLOAT64_TOLERANCE)
    if dead == "all" and score == "ratio":
        rows = torch.arange(6)
        uniform = torch.full((6, 3), 0.5, dtype=torch.float64)
        uniform[rows, problem.scenario] = 0.0
        assert torch.equal(out["scores[1]"].cpu(), uniform)


@on_every_backend
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("score", ["ratio", "softmax"])
@pytest.mark.parametrize("dead", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_second_derivative_of_dead_branches(dead, score, stop_gradient, backend):
    problem = make(Case(M=3, B=6, mutual_layers=(1, 2), score=score, stop_gradient=stop_gradient))
    problem = dataclasses.replace(problem, scenario=torch.tensor([0, 1, 2, 0, 1, 2]))
    problem.params.branch_biases[0][dead] = -100.0
    assert_close(kernel(problem, backend, retain=True), oracle(problem, retain=True), 1e-9)


# --- layouts and sizes ----------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("per_branch", [False, True], ids=["shared", "views"])
def test_layouts(layout, per_branch, backend):
    problem = make(Case(per_branch=per_branch, mutual_layers=(1, 2))).map(lambda t: laid_out(t, layout))
    ids = torch.stack([problem.scenario, torch.full_like(problem.scenario, -1)], dim=1)[:, 0]
    problem = dataclasses.replace(problem, scenario=ids)
    assert_close(kernel(problem, backend), oracle(problem), FLOAT64_TOLERANCE)


@st.composite
def cases(draw):
    L = draw(st.integers(1, 3))
    widths = st.lists(st.integers(1, 5), min_size=L, max_size=L).map(tuple)
    stop_gradient = draw(st.booleans())
    return Case(
        M=draw(st.integers(1, 6)),
        B=draw(st.sampled_from([0, 1, 2, 5, 9])),
        local_dim=draw(st.sampled_from([0, 1, 3])),
        global_dim=draw(st.sampled_from([0, 1, 4])),
        hidden_dims=draw(widths),
        aux_dims=draw(widths),
        mutual_layers=tuple(sorted(draw(st.sets(st.integers(1, L))))),
        gate=draw(st.sampled_from(["vector", "scalar"])),
        score=draw(st.sampled_from(["ratio", "softmax"])),
        activation=draw(st.sampled_from(problems.ACTIVATIONS)),
        temperature=draw(st.sampled_from([0.1, 1.0])),
        per_branch=draw(st.booleans()),
        stop_gradient=stop_gradient,
        foreign_dtype=draw(st.sampled_from([None, None, torch.int8, torch.bfloat16])) if stop_gradient else None,
        scenario_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        seed=draw(st.integers(0, 2**16)),
    )


@on_every_backend
@hypothesis.given(case=cases(), layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5))
def test_any_trunk(backend, case, layouts):
    count = iter(range(100))
    problem = make(case).map(lambda t: laid_out(t, layouts[next(count) % len(layouts)]))
    moved = problem.to(torch.float64, problems.device_of(backend))
    try:
        out = with_gradients(lambda p: p.run(backend=backend, return_scores=True), moved)
    except saml_kernels.BackendUnavailable:
        if backend == "reference":
            raise
        hypothesis.reject()
    if case.B:
        assert_close(out, oracle(problem), 1e-9)  # tiny widths condition Σ c_ij worse than the sweep's
        return
    assert out["own"].shape == (0, case.hidden_dims[-1])
    assert out["aux"].shape == (0, case.aux_dims[-1])
    assert all(out[f"scores[{layer}]"].shape == (0, case.M) for layer in case.mutual_layers)
    assert all(not gradient.any() for name, gradient in out.items() if name.startswith("∂"))


@on_every_backend
def test_no_local_features(backend):
    problem = make(Case(local_dim=0))
    assert_close(kernel(problem, backend), oracle(problem), FLOAT64_TOLERANCE)


# --- what callers rely on -------------------------------------------------------------------------------------------


@on_every_backend
def test_output_structure(backend):
    case = Case(M=4, hidden_dims=(6, 5, 4), aux_dims=(5, 3, 2), mutual_layers=(1, 3))
    problem = make(case).to(torch.float32, problems.device_of(backend)).leaves()
    with skip_unavailable(backend):
        out = problem.run(backend=backend, return_scores=True)
    assert isinstance(out, saml_kernels.TrunkOutput)
    assert out.own.shape == (case.B, 4)
    assert out.aux.shape == (case.B, 2)
    assert [None if rows is None else tuple(rows.shape) for rows in out.scores] == [(7, 4), None, (7, 4)]
    for rows in (out.scores[0], out.scores[2]):
        assert torch.allclose(rows.sum(1), torch.ones_like(rows.sum(1)))
        own = rows.gather(1, problem.scenario[:, None].long())
        assert not own.any()
        assert not rows.requires_grad
        assert (rows > 0).sum() == case.B * (case.M - 1)
    assert problem.run(backend=backend).scores is None


@on_every_backend
def test_one_scenario_is_the_identity_with_zero_scores_and_gate_gradients(backend):
    problem = make(Case(M=1))
    without = dataclasses.replace(
        problem, params=problem.params._replace(gate_weights=[None, None], gate_biases=[None, None])
    )
    out, ref = kernel(problem, backend), kernel(without, backend)
    assert torch.equal(out.pop("scores[1]").cpu(), torch.zeros(7, 1, dtype=torch.float64))
    for name in ("∂gate_weights[1]", "∂gate_biases[1]"):
        assert not out.pop(name).any()
    assert_close(out, ref, 1e-14)


@on_every_backend
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_shared_x_local_is_the_same_view_for_every_branch(stop_gradient, backend):
    shared = make(Case(M=4, stop_gradient=stop_gradient))
    views = dataclasses.replace(shared, x_local=shared.x_local[:, None].expand(-1, 4, -1))
    out, ref = kernel(views, backend), kernel(shared, backend)
    out["∂x_local"] = out["∂x_local"].sum(1)
    assert_close(out, ref, 1e-14)


@on_every_backend
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_rows_do_not_see_each_other(stop_gradient, backend):
    problem = make(Case(B=12, mutual_layers=(1, 2), stop_gradient=stop_gradient))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(
        problem,
        x_local=problem.x_local[order],
        x_global=problem.x_global[order],
        scenario=problem.scenario[order],
    )
    alone = dataclasses.replace(
        problem, x_local=problem.x_local[3:4], x_global=problem.x_global[3:4], scenario=problem.scenario[3:4]
    )
    with skip_unavailable(backend), torch.no_grad():
        device = problems.device_of(backend)
        whole, mixed, single = (p.to(torch.float64, device).run(backend=backend) for p in (problem, shuffled, alone))
    assert problems.relative_error(mixed.own, whole.own[order]) < 1e-14
    assert problems.relative_error(single.own, whole.own[3:4]) < 1e-14


@on_every_backend
@pytest.mark.parametrize("trained", ["x_local", "x_global", "branch_weights[1]", "aux_biases[2]", "gate_weights[1]"])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_one_tensor_requires_grad(trained, stop_gradient, backend):
    case = Case(stop_gradient=stop_gradient)
    problem = make(case).to(torch.float64, problems.device_of(backend))
    full = dict(problem.named())
    full[trained] = leaf = full[trained].detach().requires_grad_()
    problem = problem.holding(full.values())
    with skip_unavailable(backend):
        out = problem.run(backend=backend)
    generator = torch.Generator().manual_seed(99)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y.device, y.dtype)).sum() for y in (out.own, out.aux))
    loss.backward()
    assert problems.relative_error(leaf.grad, expected(case)[f"∂{trained}"]) <= FLOAT64_TOLERANCE
    assert all(tensor.grad is None for name, tensor in problem.named() if name != trained)


@on_every_backend
@pytest.mark.parametrize("used", ["own", "aux"])
def test_one_output_is_used(used, backend):
    problem = make(Case(mutual_layers=(1, 2)))

    def reference(p):
        return naive.multi_branch(p.x_local, p.x_global, p.scenario, p.params, **p.options)

    moved = problem.to(torch.float64, problems.device_of(backend))
    with skip_unavailable(backend):
        out = one_output(lambda p: p.run(backend=backend), moved, used)
    assert_close(out, one_output(reference, problem, used), FLOAT64_TOLERANCE)


def one_output(function, problem, used):
    leaves = problem.leaves()
    names, inputs = zip(*leaves.named(), strict=True)
    y = getattr(function(leaves), used)
    gradients = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    return dict(zip(names, gradients, strict=True))


@on_every_backend
def test_no_graph_without_gradients(backend):
    problem = make(Case()).to(torch.float64, problems.device_of(backend))
    with skip_unavailable(backend):
        plain_inputs = problem.run(backend=backend)
        with torch.no_grad():
            no_grad = problem.leaves().run(backend=backend)
        with torch.inference_mode():
            inference = problem.leaves().run(backend=backend)
    for out in (plain_inputs, no_grad, inference):
        assert not out.own.requires_grad
        assert not out.aux.requires_grad
        assert problems.relative_error(out.own, expected(Case())["own"]) <= FLOAT64_TOLERANCE


@on_every_backend
def test_inputs_are_left_alone_and_runs_repeat_bit_by_bit(backend):
    problem = make(Case(B=50, mutual_layers=(1, 2)))
    before = problem.map(torch.clone)
    first, second = kernel(problem, backend), kernel(problem, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(problem.named(), before.named(), strict=True))


@on_every_backend
def test_backward_twice_over_a_retained_graph(backend):
    problem = make(Case()).to(torch.float64, problems.device_of(backend)).leaves()
    with skip_unavailable(backend):
        loss = problem.run(backend=backend).own.square().sum()
    weight = problem.params.branch_weights[0]
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


def test_auto_is_one_of_the_available_backends():
    problem = make(Case())
    out = with_gradients(lambda p: p.run(return_scores=True), problem)
    assert_close(out, expected(Case()), FLOAT64_TOLERANCE)
