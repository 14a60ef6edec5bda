"""The extension's operators as PyTorch sees them: schemas, shapes without computation, torch.compile."""

from itertools import pairwise

import problems
import pytest
import torch
from problems import Case, make

import saml_kernels
from saml_kernels import extension
from saml_kernels.activations import ACTIVATION_NUMBERS
from saml_kernels.backends.cpp import SCORE_NUMBERS
from saml_kernels.layers import GroupedMLP, MultiBranchMLP, MutualUnit

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(extension.EXTENSION_MISSING is not None, reason=str(extension.EXTENSION_MISSING)),
]

NAMES = (
    "group_by_scenario",
    "group_by_scenario_and_clear",
    "trunk_forward",
    "trunk_backward",
    "trunk_weight_gradients",
    "mutual_forward",
    "mutual_backward",
    "experts_forward",
    "experts_backward",
)
ABOUT_THE_LIBRARY = {"build_info", "activations", "activations_need_preact", "scores"}
# Not test_autograd_registration nor test_aot_dispatch_*: the operators have no autograd formula, the
# autograd.Functions of saml_kernels.backends.cpp call them outside the graph.
UTILITIES = ("test_schema", "test_faketensor")


def operator(name):
    return getattr(torch.ops.saml_kernels, name).default


def opcheck(name, *arguments):
    torch.library.opcheck(operator(name), arguments, test_utils=UTILITIES)


TRUNKS = [
    Case(M=3, activation="relu"),
    Case(M=4, hidden_dims=(6, 5, 4), aux_dims=(5, 4, 3), mutual_layers=(1, 3), activation="gelu", per_branch=True),
    Case(M=3, hidden_dims=(6, 5, 4), aux_dims=(5, 4, 3), mutual_layers=(1, 2), activation="silu", gate="scalar"),
    Case(M=2, mutual_layers=(), activation="tanh"),
    Case(M=1, B=0, local_dim=0, global_dim=0, score="softmax"),
]


def trunk_arguments(case, dtype):
    """Inputs, permutation, offsets, parameters and options as both operators take them."""
    problem = make(case).to(dtype)
    grouping = saml_kernels.group_by_scenario(problem.scenario, case.M, backend="cpp")
    params = [[tensor for tensor in tensors if tensor is not None] for tensors in problem.params]
    return (
        problem.x_local[grouping.permutation],
        problem.x_global[grouping.permutation],
        grouping.permutation,
        grouping.offsets,
        *params,
        [],
        [layer - 1 for layer in case.mutual_layers],
        [ACTIVATION_NUMBERS[case.activation]] * len(case.hidden_dims),
        SCORE_NUMBERS[case.score],
        case.temperature,
        False,
        dtype == torch.float32,
        None,
        1.0,
    )


def without_auxiliary(case, arguments):
    """The grouped MLP: the same operators with empty auxiliary lists."""
    local, glob, permutation, offsets, weights, biases, _, _, gates, gate_biases, shared, *options = arguments
    weights = [w[:, :-a].contiguous() for w, a in zip(weights, case.aux_dims, strict=True)]
    inputs = local, glob[:, :0].contiguous(), permutation, offsets
    return *inputs, weights, biases, [], [], gates, gate_biases, shared, *options


def with_shared_weights(arguments):
    """The grouped MLP of products."""
    position = 10
    assert arguments[position] == []
    shared = [torch.randn(weight.shape[1:], dtype=weight.dtype) for weight in arguments[4]]
    return *arguments[:position], shared, *arguments[position + 1 :]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("B", [0, 1, 9])
def test_group_by_scenario(B, dtype):
    opcheck("group_by_scenario", torch.arange(B, dtype=dtype) % 3, 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("B", "counters"), [(0, 0), (1, 5), (9, 1)])
def test_group_by_scenario_and_clear(B, counters, dtype, poisoned_empty):
    scenario = torch.arange(B, dtype=dtype) % 3
    opcheck("group_by_scenario_and_clear", scenario, 3, counters)
    permutation, offsets, cleared = operator("group_by_scenario_and_clear")(scenario, 3, counters)
    expected, _, expected_offsets = operator("group_by_scenario")(scenario, 3)
    assert torch.equal(permutation, expected)
    assert torch.equal(offsets, expected_offsets)
    assert torch.equal(cleared, torch.zeros(counters, dtype=torch.int32))


def test_bad_arguments_of_group_by_scenario_and_clear():
    clear = operator("group_by_scenario_and_clear")
    with pytest.raises(ValueError, match="num_counters must not be negative, got -1"):
        clear(torch.tensor([0]), 3, -1)
    with pytest.raises(ValueError, match="row 1 holds 3"):
        clear(torch.tensor([0, 3]), 3, 1)
    with pytest.raises(TypeError, match="scenario must be int32 or int64"):
        clear(torch.tensor([0.0]), 3, 1)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("case", TRUNKS, ids=str)
def test_trunk(case, dtype, auxiliary, recompute):
    arguments = trunk_arguments(case, dtype)
    if not auxiliary:
        arguments = without_auxiliary(case, arguments)
    opcheck("trunk_forward", *arguments, False, recompute, False)
    opcheck("trunk_forward", *arguments, True, recompute, False)
    if not case.mutual_layers:
        opcheck("trunk_forward", *arguments, True, recompute, True)
    own, aux, scores, factors, kept = operator("trunk_forward")(*arguments, True, recompute, False)
    cotangents = torch.randn_like(own), torch.randn_like(aux)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        call = (*cotangents, scores, factors, kept, *arguments, recompute, *needs)
        opcheck("trunk_backward", *call)
    opcheck("trunk_weight_gradients", operator("trunk_backward")(*call)[-1], factors, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [0, 9])
def test_trunk_that_gates(B, dtype):
    case = Case(M=3, B=B, mutual_layers=())
    *arguments, activations, score, temperature, own, foreign, _, _ = without_auxiliary(
        case, trunk_arguments(case, dtype)
    )
    activations = [*activations[:-1], ACTIVATION_NUMBERS["identity"]]
    gated = torch.randn(B, case.hidden_dims[-1], dtype=dtype)
    arguments += [activations, score, temperature, own, foreign, gated, 1.5]
    opcheck("trunk_forward", *arguments, True, False, False)
    own, aux, scores, factors, kept = operator("trunk_forward")(*arguments, True, False, False)
    opcheck("trunk_backward", own, aux, scores, factors, kept, *arguments, False, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [0, 9])
def test_trunk_of_products(B, dtype):
    case = Case(M=3, B=B, mutual_layers=())
    arguments = with_shared_weights(without_auxiliary(case, trunk_arguments(case, dtype)))
    opcheck("trunk_forward", *arguments, True, False, False)
    own, aux, scores, factors, kept = operator("trunk_forward")(*arguments, True, False, False)
    call = own, aux, scores, factors, kept, *arguments, False, True, False
    opcheck("trunk_backward", *call)
    opcheck("trunk_weight_gradients", operator("trunk_backward")(*call)[-1], factors, *arguments)


@pytest.mark.parametrize("change", [lambda shared: shared.double(), lambda shared: shared[1:]], ids=["type", "shape"])
def test_shared_weights_that_do_not_fit(change):
    case = Case(M=3, mutual_layers=())
    arguments = list(with_shared_weights(without_auxiliary(case, trunk_arguments(case, torch.float32))))
    arguments[10] = [*arguments[10][:-1], change(arguments[10][-1])]
    with pytest.raises(ValueError, match="shared_weights must be float32 or float64 as the branches'"):
        operator("trunk_forward")(*arguments, False, False, False)
    arguments[10] = arguments[10][:1]
    with pytest.raises(ValueError, match="shared_weights must be none or one a layer: 2, got 1"):
        operator("trunk_forward")(*arguments, False, False, False)


def test_a_gate_needs_an_identity_below():
    case = Case(M=3, mutual_layers=(), activation="relu")
    *arguments, _, _ = without_auxiliary(case, trunk_arguments(case, torch.float32))
    with pytest.raises(ValueError, match="gated needs an identity after the last layer"):
        operator("trunk_forward")(*arguments, torch.zeros(case.B, case.hidden_dims[-1]), 1.0, False, False, False)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("widths", [(5, 6, 2), (5, 2)], ids=["two layers", "one layer"])
@pytest.mark.parametrize("B", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_experts(dtype, B, widths, activation):
    torch.manual_seed(0)
    weights = [torch.randn(3, i, o, dtype=dtype) for i, o in pairwise(widths)]
    biases = [torch.randn(3, o, dtype=dtype) for o in widths[1:]]
    activations = [ACTIVATION_NUMBERS[activation]] * len(weights)
    arguments = torch.randn(B, 5, dtype=dtype), weights, biases, activations, dtype == torch.bfloat16
    opcheck("experts_forward", *arguments, False)
    opcheck("experts_forward", *arguments, True)
    out, kept = operator("experts_forward")(*arguments, True)
    for need_input in (True, False):
        opcheck("experts_backward", torch.randn_like(out), out, kept, *arguments, need_input)


@pytest.mark.parametrize("gate_width", [1, 5])
@pytest.mark.parametrize("B", [0, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mutual(dtype, B, gate_width):
    torch.manual_seed(0)
    grouping = saml_kernels.group_by_scenario(torch.arange(B) % 3, 3, backend="cpp")
    arguments = (
        torch.randn(B, 3, 5, dtype=dtype),
        grouping.permutation,
        grouping.offsets,
        torch.randn(3, 5, gate_width, dtype=dtype),
        torch.randn(3, gate_width, dtype=dtype),
        SCORE_NUMBERS["softmax"],
        0.5,
        False,
    )
    opcheck("mutual_forward", *arguments)
    mutual, *kept = operator("mutual_forward")(*arguments)
    opcheck("mutual_backward", torch.randn_like(mutual), *kept, *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_functional(name):
    """No operator writes to an argument or returns a view of one, so torch.compile may reorder and drop calls."""
    schema = operator(name)._schema
    assert not schema.is_mutable
    assert all(entry.alias_info is None for entry in (*schema.arguments, *schema.returns))


def test_there_is_no_operator_without_a_check():
    names = {
        name.removeprefix("saml_kernels::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("saml_kernels::")
    }
    # keep_layouts and release_memory take and give no tensor: tests/kernels/test_cpp_kept.py, test_cpp_memory.py.
    assert names == {*NAMES, *ABOUT_THE_LIBRARY, "keep_layouts", "release_memory"}


def test_all_branches_exclude_mutual_layers():
    case = next(case for case in TRUNKS if case.mutual_layers)
    with pytest.raises(ValueError, match="all_branches excludes mutual layers"):
        operator("trunk_forward")(*trunk_arguments(case, torch.float32), False, False, True)


def test_another_dtype_is_an_error():
    arguments = trunk_arguments(TRUNKS[0], torch.float32)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        operator("trunk_forward")(arguments[0], arguments[1].double(), *arguments[2:], False, False, False)


# --- torch.compile --------------------------------------------------------------------------------------------------


def layer_and_inputs(kind):
    torch.manual_seed(0)
    local, glob, scenario = torch.randn(50, 9), torch.randn(50, 7), torch.randint(4, (50,))
    if kind is MultiBranchMLP:
        return MultiBranchMLP(4, 9, 7, (17, 8), mutual_layers=(1, 2), activation="gelu"), (local, glob, scenario)
    if kind is GroupedMLP:
        return GroupedMLP(4, 9, (17, 8)), (local, scenario)
    return MutualUnit(4, 9), (torch.randn(50, 4, 9), scenario)


def step(function, layer, inputs):
    """Output and every gradient of a forward and a backward pass."""
    layer.zero_grad()
    x = inputs[0].clone().requires_grad_()
    out = function(x, *inputs[1:])
    own = out.own if isinstance(layer, MultiBranchMLP) else out
    own.square().sum().backward()
    return {"own": own.detach(), "∂x": x.grad} | {f"∂{name}": p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [MultiBranchMLP, GroupedMLP, MutualUnit], ids=lambda kind: kind.__name__)
def test_compile_equals_eager(kind, compiler):
    """In one graph: nothing in a layer breaks it."""
    layer, inputs = layer_and_inputs(kind)
    eager = step(layer, layer, inputs)
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    try:
        for _ in range(2):
            problems.assert_close(step(compiled, layer, inputs), eager, 1e-6)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("kind", ["gate", "experts"])
def test_compile_of_a_gate_and_of_experts_equals_eager(kind):
    torch.manual_seed(0)
    shapes = (50, 5), (3, 5, 6), (3, 6, 4), (3, 6), (3, 4), (50, 4)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    scenario = torch.randint(3, (50,))

    def function(x, w0, w1, b0, b1, gated):
        if kind == "gate":
            return saml_kernels.grouped_mlp(x, scenario, [w0, w1], [b0, b1], gated=gated)
        return saml_kernels.expert_outputs(x, [w0, w1], [b0, b1], activation="gelu")

    def results(function):
        out = function(*leaves)
        wanted = leaves if kind == "gate" else leaves[:5]
        gradients = torch.autograd.grad(out.square().sum(), wanted)
        return {str(number): tensor.detach() for number, tensor in enumerate((out, *gradients))}

    try:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        problems.assert_close(results(compiled), results(function), 1e-6)
    finally:
        torch.compiler.reset()


def test_compile_of_another_batch_size():
    layer, (local, glob, scenario) = layer_and_inputs(MultiBranchMLP)
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True)
    try:
        for rows in (50, 31, 1):
            inputs = local[:rows], glob[:rows], scenario[:rows]
            problems.assert_close(step(compiled, layer, inputs), step(layer, layer, inputs), 1e-6)
    finally:
        torch.compiler.reset()
