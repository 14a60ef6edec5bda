"""The Triton kernels in Triton's interpreter: are the numbers right?

    TRITON_INTERPRET=1 pytest -m interpreter

Whether they compile is for test_aot.py. bfloat16 is wrong in the interpreter itself, so it is compiled only.
"""

import dataclasses
import itertools

import exactness
import problems
import pytest
import torch
from problems import ACTIVATIONS, FLOAT32_TOLERANCE, Case, assert_close, batched_oracle, errors, make, oracle

import saml_kernels
from saml_kernels import reference
from saml_kernels.backends.triton import availability

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

# Odd widths and rows: every tile has a remainder. Branches 1, no scenario without rows only in some.
CASES = [
    Case(M=1, B=5, local_dim=3, global_dim=2, hidden_dims=(7, 5), aux_dims=(3, 1)),
    Case(M=2, B=1, local_dim=1, global_dim=1, hidden_dims=(1, 1), aux_dims=(1, 1)),
    Case(M=3, B=19, local_dim=17, global_dim=5, hidden_dims=(33, 6), aux_dims=(9, 18), mutual_layers=(2,)),
    Case(M=3, B=41, hidden_dims=(18, 5, 3), aux_dims=(4, 17, 2), mutual_layers=(1, 2)),
    Case(M=4, B=23, hidden_dims=(5, 6), aux_dims=(4, 3), mutual_layers=(1, 2), gate="scalar", score="softmax"),
    Case(M=4, B=23, hidden_dims=(5, 6, 4), aux_dims=(4, 3, 2), mutual_layers=(1, 3), score="softmax"),
    Case(M=7, B=30, hidden_dims=(17, 16), aux_dims=(3, 2), mutual_layers=()),
    Case(M=20, B=9, hidden_dims=(6, 4), aux_dims=(5, 3), mutual_layers=(1, 2)),
    Case(M=64, B=9, hidden_dims=(6, 4), aux_dims=(5, 3), gate="scalar"),
    Case(M=2, B=70, hidden_dims=(6, 4), aux_dims=(5, 3), mutual_layers=(1,)),
]
CASES = [
    dataclasses.replace(case, activation=ACTIVATIONS[i % len(ACTIVATIONS)], per_branch=i % 3 == 2, seed=i)
    for i, case in enumerate(CASES)
]


def run(problem, **options):
    return problems.with_gradients(lambda p: p.run(backend="triton", return_scores=True, **options), problem)


@pytest.fixture(autouse=True)
def poisoned(poisoned_empty):
    """Whatever a kernel should have written and did not is NaN."""


@pytest.fixture
def poisoned_empty():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("schedule", ["persistent", "per_layer"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, schedule):
    problem = make(case)
    assert_close(run(problem.to(torch.float32), schedule=schedule), oracle(problem), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("schedule", ["persistent", "per_layer"])
@pytest.mark.parametrize("dims", [(6, 5), (16, 8)], ids=["bodies of their own", "bodies shared"])
def test_parity_without_local_features(dims, schedule):
    """The first factor of the first layer has no columns, the second has."""
    problem = make(Case(M=3, B=20, local_dim=0, global_dim=8, hidden_dims=dims, aux_dims=dims))
    assert_close(run(problem.to(torch.float32), schedule=schedule), oracle(problem), FLOAT32_TOLERANCE)


def test_parity_where_weights_end_within_a_tile_and_others_do_not():
    """All widths whole vectors, so that weights could share code: of 16 rows of the branch stream, and of 12."""
    problem = make(Case(M=3, B=20, local_dim=16, global_dim=8, hidden_dims=(12, 16, 8), aux_dims=(8, 8, 8)))
    assert_close(run(problem.to(torch.float32)), oracle(problem), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[6]], ids=str)
def test_parity_of_streams_computed_again(case, monkeypatch):
    """In turns of a tile each, as where all streams would take too much memory."""
    from saml_kernels.backends.triton import configs

    monkeypatch.setattr(configs, "SCRATCH_BYTES", 1)
    problem = make(case)
    assert_close(run(problem.to(torch.float32), recompute=True), oracle(problem), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["kept", "recomputed"])
def test_both_forms_give_the_same_bits(options):
    problem = make(CASES[5]).to(torch.float32)
    persistent, per_layer = (run(problem, schedule=schedule, **options) for schedule in ("persistent", "per_layer"))
    assert all(torch.equal(persistent[name], per_layer[name]) for name in persistent)


def test_counters_are_zero_again():
    """Forward, chain and weights share one buffer; a launch must leave it as it found it."""
    from saml_kernels.backends.triton import launch

    counters = []
    original = launch.run

    def record(*arguments, **options):
        original(*arguments, **options)
        counters.append(arguments[4].counters)
        assert not counters[-1].any()

    problem = make(CASES[3]).to(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", record)
        run(problem)
    assert len(counters) == 2
    assert counters[0].data_ptr() == counters[1].data_ptr()
    assert not counters[0].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity_of_every_activation(activation):
    problem = make(Case(M=3, B=20, activation=activation))
    assert_close(run(problem.to(torch.float32)), oracle(problem), FLOAT32_TOLERANCE)


@pytest.mark.parametrize("operation", ["grouped_mlp", "expert_outputs"])
def test_derivatives_are_exact(operation):
    for name in exactness.TORCH:
        exactness.check_not_a_number_goes_on(operation, name, "triton")
    exactness.check_tail(operation, "silu", "triton")
    exactness.check_tail(operation, "tanh", "triton")


def test_a_closed_gate():
    exactness.check_closed_gate("triton")


def test_bias_gradient_of_rows_that_cancel():
    assert max(exactness.bias_gradient_errors("grouped_mlp", "triton")) <= FLOAT32_TOLERANCE


# Wide enough that an error is an average and not the rounding of a few numbers.
FLOAT16 = [
    Case(
        M=3,
        B=60,
        local_dim=17,
        hidden_dims=(18, 21, 17),
        aux_dims=(20, 17, 18),
        mutual_layers=(1, 2),
        activation="silu",
    ),
    Case(M=4, B=60, hidden_dims=(18, 33), aux_dims=(20, 17), mutual_layers=(2,), per_branch=True, score="softmax"),
]


@pytest.mark.parametrize("case", FLOAT16, ids=str)
def test_float16_errs_at_most_twice_as_much_as_plain_torch(case):
    problem = make(case).to(torch.float16)
    exact = batched_oracle(problem)
    plain = errors(batched_oracle(problem, torch.float16), exact)
    out = run(problem)
    assert out["own"].dtype == out["∂x_local"].dtype == torch.float16
    wrong = {name: (error, plain[name]) for name, error in errors(out, exact).items() if not error <= 2 * plain[name]}
    assert not wrong


@pytest.mark.parametrize("score", ["ratio", "softmax"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_the_score_part_of_the_gradient(score, gate):
    """A fraction of a percent of dV_t, so an error in it would hide: taken apart from the rest."""
    case = Case(M=4, B=11, local_dim=6, hidden_dims=(6,), aux_dims=(1,), gate=gate, score=score, per_branch=True)
    generator = torch.Generator().manual_seed(1)
    v = 0.3 * torch.randn(11, 4, 6, generator=generator) + 0.5
    width = 6 if gate == "vector" else 1
    weight, bias = torch.zeros(4, 6, width), torch.zeros(4, width)
    scenario = torch.randint(4, (11,), generator=generator)
    cotangent = torch.randn(11, 6, generator=generator)

    def score_part(dtype, backend):
        leaf = v.to(dtype).requires_grad_()
        arguments = scenario, weight.to(dtype), bias.to(dtype)
        out = saml_kernels.mutual_unit(leaf, *arguments, score=case.score, backend=backend)
        (whole,) = torch.autograd.grad(out, leaf, cotangent.to(dtype))
        own = whole[torch.arange(11), scenario]
        # The gate's weights are zero, so what is left beside dM is the scores'.
        return own - cotangent.to(dtype)

    exact = score_part(torch.float64, "reference")
    assert exact.norm() > 0
    error = (score_part(torch.float32, "triton").double() - exact).norm() / exact.norm()
    assert error < 1e-4


@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[8]], ids=str)
def test_the_mutual_unit_alone(case, gate):
    generator = torch.Generator().manual_seed(0)
    M, B, d = case.M, case.B, 19
    width = d if gate == "vector" else 1
    leaves = [torch.randn(B, M, d, generator=generator) + 0.5, torch.randn(M, d, width, generator=generator) / d]
    leaves.append(torch.randn(M, width, generator=generator))
    scenario = torch.randint(M, (B,), generator=generator)

    def evaluate(dtype, backend):
        inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out, alpha = saml_kernels.mutual_unit(
            inputs[0], scenario, *inputs[1:], score=case.score, backend=backend, return_scores=True
        )
        gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
        return dict(zip(("out", "alpha", "∂v", "∂U", "∂u"), (out.detach(), alpha, *gradients), strict=True))

    assert_close(evaluate(torch.float32, "triton"), evaluate(torch.float64, "reference"), FLOAT32_TOLERANCE)


def evaluate_tensors(operation, leaves, dtype, backend):
    """What ``operation`` of the leaves gives, and their gradients."""
    inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    out = operation(inputs, backend)
    gradients = torch.autograd.grad(out, inputs, torch.cos(torch.arange(out.numel())).reshape(out.shape).to(dtype))
    return {str(i): tensor.detach() for i, tensor in enumerate((out, *gradients))}


def tower_leaves(M, B, widths, *others):
    """x, weights and biases of two layers, then tensors of other shapes."""
    generator = torch.Generator().manual_seed(0)
    pairs = list(itertools.pairwise(widths))
    shapes = [(B, widths[0]), *((M, i, o) for i, o in pairs), *((M, o) for o in widths[1:]), *others]
    return [torch.randn(shape, generator=generator) / (shape[-2] ** 0.5 if len(shape) == 3 else 1) for shape in shapes]


# Odd widths, and whole vectors with a tile's worth of columns and more.
GATES = pytest.mark.parametrize(("M", "B", "widths"), [(4, 37, (9, 17, 3)), (3, 20, (16, 16, 40)), (1, 5, (3, 4, 1))])


@GATES
def test_a_gate(M, B, widths):
    leaves = tower_leaves(M, B, widths, (B, widths[-1]))
    scenario = torch.arange(B) % M if M < 4 else torch.full((B,), 2)

    def operation(inputs, backend):
        x, w0, w1, b0, b1, gated = inputs
        options = {"activation": "silu", "gated": gated, "gate_scale": 1.5, "backend": backend}
        return saml_kernels.grouped_mlp(x, scenario, [w0, w1], [b0, b1], **options)

    found, exact = (
        evaluate_tensors(operation, leaves, *kind) for kind in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    assert_close(found, exact, FLOAT32_TOLERANCE)


@GATES
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_experts(M, B, widths, activation):
    def operation(inputs, backend):
        x, w0, w1, b0, b1 = inputs
        return saml_kernels.expert_outputs(x, [w0, w1], [b0, b1], activation=activation, backend=backend)

    leaves = tower_leaves(M, B, widths)
    found, exact = (
        evaluate_tensors(operation, leaves, *kind) for kind in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    assert_close(found, exact, FLOAT32_TOLERANCE)


def test_launches_of_a_gate_and_of_experts():
    from saml_kernels.backends.triton.launch import LAUNCHES

    x, w0, w1, b0, b1, gated = (t.requires_grad_() for t in tower_leaves(3, 9, (4, 5, 2), (9, 2)))
    layers, options = ([w0, w1], [b0, b1]), {"backend": "triton"}
    for call in (
        lambda: saml_kernels.grouped_mlp(x, torch.arange(9) % 3, *layers, gated=gated, **options),
        lambda: saml_kernels.expert_outputs(x, *layers, **options),
    ):
        LAUNCHES.clear()
        out = call()
        assert LAUNCHES.total() == 1
        out.sum().backward()
        assert LAUNCHES.total() == 3


@pytest.mark.parametrize("operation", ["grouped_mlp", "branch_scores"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_towers(operation, activation):
    generator = torch.Generator().manual_seed(0)
    widths, M, B = (9, 17, 3), 4, 37
    leaves = [torch.randn(B, 9, generator=generator)]
    leaves += [torch.randn(M, i, o, generator=generator) / i**0.5 for i, o in ((9, 17), (17, 3))]
    leaves += [torch.randn(M, o, generator=generator) for o in widths[1:]]
    scenario = torch.randint(M, (B,), generator=generator)

    def evaluate(dtype, backend):
        x, *parameters = inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out = getattr(saml_kernels, operation)(
            x,
            scenario,
            parameters[:2],
            parameters[2:],
            activation=activation,
            output_activation="identity",
            backend=backend,
        )
        gradients = torch.autograd.grad(out, inputs, torch.cos(torch.arange(out.numel())).reshape(out.shape).to(dtype))
        return {str(i): tensor.detach() for i, tensor in enumerate((out, *gradients))}

    assert_close(evaluate(torch.float32, "triton"), evaluate(torch.float64, "reference"), FLOAT32_TOLERANCE)


def test_degenerate_cosines_weigh_alike():
    """Opposite foreign streams: Σ c_ij = 0, so α is uniform and the scores carry no gradient."""
    v = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]], requires_grad=True)
    out, alpha = saml_kernels.mutual_unit(
        v, torch.tensor([0]), torch.zeros(3, 2, 2), torch.zeros(3, 2), backend="triton", return_scores=True
    )
    assert torch.equal(alpha, torch.tensor([[0.0, 0.5, 0.5]]))
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert torch.equal(gradient[0, 0], torch.ones(2))


@pytest.mark.parametrize(("B", "scenario"), [(0, 0), (6, 2)])
def test_scenarios_without_rows_have_zero_gradients(B, scenario):
    problem = make(Case(M=3, B=B)).to(torch.float32)
    problem = dataclasses.replace(problem, scenario=torch.full((B,), scenario))
    out = run(problem)
    for name in ("∂branch_weights[1]", "∂branch_biases[2]", "∂gate_weights[1]"):
        absent = [k for k in range(3) if B == 0 or k != scenario]
        assert not out[name][absent].any()
        assert out[name].isfinite().all()


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=str)
def test_the_same_bits_from_run_to_run(case):
    problem = make(case).to(torch.float32)
    first, second = run(problem), run(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_do_not_show():
    problem = make(Case(M=3, B=17)).to(torch.float32)
    strided = problem.map(lambda t: torch.stack([t, t + 1], -1)[..., 0])
    assert not strided.x_local.is_contiguous()
    plain, other = run(problem), run(strided)
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def launches(problem, **options):
    from saml_kernels.backends.triton.launch import LAUNCHES

    LAUNCHES.clear()
    problem.run(backend="triton", **options)
    forward = LAUNCHES.total()
    LAUNCHES.clear()
    run(problem, **options)
    return forward, LAUNCHES.total() - forward


@pytest.mark.parametrize(("M", "B"), [(2, 9), (7, 40)])
@pytest.mark.parametrize(
    ("hidden_dims", "mutual_layers", "per_layer_launches"),
    [
        # The auxiliary network, layer 1 of all branches, the rest.
        ((6, 4, 3), (1,), 3),
        # Layer 1, its gates, layer 2 besides.
        ((6, 4), (1, 2), 6),
        ((6, 4), (), 1),
    ],
)
def test_launches_depend_on_neither_branches_nor_rows(M, B, hidden_dims, mutual_layers, per_layer_launches):
    case = Case(M=M, B=B, hidden_dims=hidden_dims, aux_dims=hidden_dims, mutual_layers=mutual_layers)
    problem = make(case).to(torch.float32)
    assert launches(problem, schedule="persistent") == (1, 2)
    assert launches(problem, schedule="per_layer") == (per_layer_launches, 2)


def test_launches_of_towers():
    from saml_kernels.backends.triton.launch import LAUNCHES

    x, scenario = torch.randn(9, 4, requires_grad=True), torch.arange(9) % 3
    weights, biases = [torch.randn(3, 4, 5), torch.randn(3, 5, 2)], [torch.randn(3, 5), torch.randn(3, 2)]
    for operation in (saml_kernels.grouped_mlp, saml_kernels.branch_scores):
        LAUNCHES.clear()
        out = operation(x, scenario, weights, biases, backend="triton")
        assert LAUNCHES.total() == 1
        out.sum().backward()
        assert LAUNCHES.total() == 3


FOREIGN = [
    Case(M=4, B=23, local_dim=17, hidden_dims=(18, 6), aux_dims=(9, 5)),
    Case(M=3, B=21, local_dim=7, hidden_dims=(33, 6), aux_dims=(9, 5), mutual_layers=(1, 2), per_branch=True),
    Case(M=3, B=21, local_dim=7, hidden_dims=(9, 6), aux_dims=(9, 5), mutual_layers=(2,), activation="gelu"),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", FOREIGN, ids=str)
def test_foreign_int8(case, recompute):
    """Against the reference of the same quantised foreign factors. int8 products are exact in the interpreter."""
    rounded = make(dataclasses.replace(case, foreign_dtype=torch.int8))
    single = rounded.to(torch.float32)
    exact = problems.with_gradients(lambda p: p.run(backend="reference", return_scores=True), single)
    # A value on the border between two integers falls to either side by the last bit of what it was computed from.
    assert_close(run(single, recompute=recompute), exact, 1e-4)
    full = problems.with_gradients(lambda p: p.run(backend="reference", return_scores=True, foreign_dtype=None), single)
    assert errors(exact, full)["own"] > 1e-4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_are_quantized_as_the_reference_rounds_them(dtype):
    from saml_kernels.backends.triton import engine

    weight = torch.randn(3, 19, 37)
    if dtype == torch.float8_e4m3fn:
        # The interpreter's cast loses a carry into the exponent, so only values that need no rounding can be compared.
        weight = (64 * weight).to(dtype).float()
        weight[:, 0] = 448.0
    weight[1, :, 4] = 0
    found, scale = engine.quantize_weight(weight, dtype)
    expected, expected_scale = reference.round_to(weight, dtype, dim=1)
    assert torch.equal(scale, expected_scale.squeeze(1))
    assert found.shape == (3, 37, 32)
    assert torch.equal(found[:, :, :19].float(), expected.transpose(1, 2).float())
    assert not found[:, :, 19:].float().any()


@pytest.mark.parametrize(
    ("dtype", "value"), [each for each in exactness.NOT_FINITE_FOREIGN if each[0] != torch.bfloat16], ids=str
)
def test_foreign_values_that_are_not_finite(dtype, value):
    exactness.check_not_finite_foreign_values(dtype, value, "triton")


def test_foreign_bfloat16_leaves_the_own_stream_alone():
    """The interpreter rounds to bfloat16 rightly, it only multiplies wrongly; with one branch nothing is foreign."""
    case = Case(M=1, B=9, foreign_dtype=torch.bfloat16)
    rounded = make(case).to(torch.float32)
    plain = make(dataclasses.replace(case, foreign_dtype=None)).to(torch.float32)
    out, full = run(rounded), run(plain)
    assert all(torch.equal(out[name], full[name]) for name in ("own", "aux", "∂x_local"))


def test_another_choice_between_forward_and_backward():
    """As tuning in the same process may bring: smaller tiles need more counters than the forward made."""
    from saml_kernels.backends.triton import configs

    large, small = (configs.Config(rows, 32, 16, 4, 1, item_rows=8) for rows in (64, 16))
    problem = make(Case(M=2, B=70, hidden_dims=(6,), aux_dims=(4,))).to(torch.float32).leaves()
    leaves = [tensor for _, tensor in problem.named()]
    results = []
    for forward, backward in ((small, small), (large, small)):
        with configs.forced(configs.Choice("persistent", forward, forward, forward)):
            out = problem.run(backend="triton")
        with configs.forced(configs.Choice("persistent", backward, backward, backward)):
            results.append(torch.autograd.grad((out.own.sum(), out.aux.sum()), leaves))
    assert_close(*({str(i): g for i, g in enumerate(gradients)} for gradients in results), FLOAT32_TOLERANCE)


def test_inference_keeps_nothing_for_backward():
    with torch.inference_mode():
        out = make(CASES[3]).to(torch.float32).run(backend="triton")
    assert_close({"own": out.own}, {"own": oracle(make(CASES[3]))["own"]}, FLOAT32_TOLERANCE)


def test_auto_does_not_take_the_interpreter():
    problem = make(Case()).to(torch.float32)
    assert saml_kernels.available_backends()["triton"] is None
    expected = problem.run(backend="cpp") if saml_kernels.available_backends()["cpp"] is None else None
    auto = problem.run()
    assert expected is None or torch.equal(auto.own, expected.own)


def test_float64_is_refused():
    with pytest.raises(saml_kernels.BackendUnavailable, match="float64 is not available"):
        make(Case()).run(backend="triton")


def test_what_it_refuses_is_said():
    problem = make(Case()).to(torch.float32)
    with pytest.raises(saml_kernels.BackendUnavailable, match="stop_gradient=False needs the reference"):
        problem.run(backend="triton", stop_gradient=False)
    for backend in ("cpp", "reference"):
        if saml_kernels.available_backends()[backend] is None:
            with pytest.raises(saml_kernels.BackendUnavailable, match="schedule is a choice of the triton backend"):
                problem.run(backend=backend, schedule="persistent")
    with pytest.raises(saml_kernels.BackendUnavailable, match='foreign_dtype needs schedule "per_layer"'):
        problem.run(backend="triton", schedule="persistent", foreign_dtype=torch.int8)
    with pytest.raises(ValueError, match="did you mean 'persistent'"):
        problem.run(backend="triton", schedule="persistant")


def test_the_device_has_every_activation_and_the_constants_of_the_reference():
    from saml_kernels.backends.triton.kernels import mutual
    from saml_kernels.backends.triton.kernels.activations import DEVICE_ACTIVATIONS

    assert set(DEVICE_ACTIVATIONS) == {*ACTIVATIONS, "sigmoid"}
    assert mutual.NORM_EPSILON.value == reference.NORM_EPSILON
    assert mutual.DEGENERATE_SUM.value == reference.DEGENERATE_SUM
