"""PyTorch's tools on every layer: docs/pytorch.md has a table of them, and every cell of it is tried here."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_table import ROWS, Row, first_output
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

import saml_kernels
from saml_kernels import BackendUnavailable, available_backends, layers

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(available_backends()["cpp"] is not None, reason="needs the extension"),
]

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"
WITHOUT_KERNELS = ("GroupedBatchNorm", "PartitionedNorm")


def loss(layer: nn.Module, state, *inputs: Tensor) -> Tensor:
    return first_output(functional_call(layer, state, inputs)).square().sum()


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def gradients(layer: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """By autograd, zeros where a parameter is not reached."""
    layer.zero_grad()
    first_output(layer(*inputs)).square().sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in layer.named_parameters()
    }


def with_backend(layer: nn.Module, name: str) -> nn.Module:
    for module in layer.modules():
        if hasattr(module, "backend"):
            module.backend = name
    return layer


def in_double(row: Row) -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer, inputs = row(6)
    return layer.eval().double(), tuple(each.double() if each.is_floating_point() else each for each in inputs)


def try_functional_call(row: Row) -> None:
    layer, inputs = row(6)
    other = row(6, seed=1)[0].eval()
    out = first_output(functional_call(layer.eval(), dict(other.named_parameters()), inputs))
    torch.testing.assert_close(out, first_output(other(*inputs)))


def try_grad(row: Row) -> None:
    layer, inputs = row(6)
    found = grad(lambda state: loss(layer.eval(), state, *inputs))(parameters(layer))
    torch.testing.assert_close(found, gradients(layer, *inputs), rtol=1e-4, atol=1e-6)


def try_vjp(row: Row) -> None:
    layer, (x, *rest) = row(6)
    out, pull = vjp(lambda x: first_output(layer.eval()(x, *rest)), x)
    cotangent = torch.randn_like(out)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(first_output(layer(leaf, *rest)), leaf, cotangent)
    torch.testing.assert_close(pull(cotangent)[0], expected, rtol=1e-4, atol=1e-6)


def try_jvp(row: Row) -> None:
    """By both ways, against the Jacobian that backward gives: a stop-gradient stops tangents too."""
    layer, (x, *rest) = in_double(row)

    def function(x: Tensor) -> Tensor:
        return first_output(layer(x, *rest))

    tangent = torch.randn_like(x)
    jacobian = torch.autograd.functional.jacobian(function, x)
    expected = jacobian.flatten(jacobian.dim() - x.dim()) @ tangent.flatten()
    torch.testing.assert_close(jvp(function, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, expected)


def try_vmap(row: Row) -> None:
    """Gradients of single rows, and an ensemble."""
    layer, inputs = row(6)
    state = parameters(layer.eval())
    in_dims = (None, *[0] * len(inputs))
    found = vmap(grad(lambda state, *row: loss(layer, state, *[each[None] for each in row])), in_dims)(state, *inputs)
    for number in range(6):
        expected = gradients(layer, *[each[number : number + 1] for each in inputs])
        torch.testing.assert_close({name: each[number] for name, each in found.items()}, expected, rtol=1e-4, atol=1e-5)
    members = [row(6, seed=seed)[0].eval() for seed in range(3)]
    outputs = vmap(lambda *state: first_output(functional_call(layer, state, inputs)))(*stack_module_state(members))
    for member, out in zip(members, outputs, strict=True):
        torch.testing.assert_close(first_output(member(*inputs)), out, rtol=1e-4, atol=1e-5)


def try_meta(row: Row) -> None:
    layer, inputs = row(6)
    shape = first_output(layer(*inputs)).shape
    out = first_output(layer.to("meta")(*[each.to("meta") for each in inputs]))
    assert out.shape == shape
    assert out.device.type == "meta"


def try_fake(row: Row) -> None:
    layer, inputs = row(6)
    shape = first_output(layer(*inputs)).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, *rest = [mode.from_tensor(each) for each in inputs]
        x = x.requires_grad_()
        out = first_output(layer(x, *rest))
        assert out.shape == shape
        out.sum().backward()
        assert x.grad.shape == x.shape


def try_flops(row: Row) -> None:
    """Near plain PyTorch's, which forms some scores twice and leaves others to sums that are not counted."""
    layer, (x, *rest) = row(6)
    x.requires_grad_()
    counts = {}
    for name in ("auto", "reference"):
        with_backend(layer, name)
        with FlopCounterMode(display=False) as counter:
            first_output(layer(x, *rest)).sum().backward()
        counts[name] = counter.get_total_flops()
    assert counts["reference"] / 2 < counts["auto"] < 2 * counts["reference"]


def try_double_backward(row: Row) -> None:
    layer, (x, *rest) = in_double(row)
    found = {}
    for name in ("auto", "reference"):
        with_backend(layer, name)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(first_output(layer(leaf, *rest)).square().sum(), leaf, create_graph=True)
        (found[name],) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(found["auto"], found["reference"])


def try_autocast(row: Row) -> None:
    layer, inputs = row(6)
    plain = first_output(layer.eval()(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        out = first_output(layer(*inputs))
    assert out.dtype == (torch.float32 if row.layer in (*WITHOUT_KERNELS, "ScoreMixture") else torch.bfloat16)
    # Numbers of 8 bits through up to three layers, gates and scores.
    torch.testing.assert_close(out.float(), plain, rtol=0.03, atol=0.03)


class FirstOutput(nn.Module):
    """A trace returns no None, which scores may be."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return first_output(self.layer(*inputs))


def try_trace(row: Row) -> None:
    layer, inputs = row(6)
    traced = torch.jit.trace(FirstOutput(layer.eval()), inputs, check_trace=False)
    others = row.inputs(9)
    torch.testing.assert_close(traced(*others), first_output(layer(*others)), rtol=1e-4, atol=1e-5)


def try_script(row: Row) -> None:
    torch.jit.script(row(6)[0])


def try_onnx(row: Row) -> None:
    """By the newer exporter, for any number of rows, as another program reads the file."""
    onnx = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    layer, inputs = row(6)
    every_batch = tuple({0: torch.export.Dim("B")} for _ in inputs)
    try:
        program = torch.onnx.export(
            FirstOutput(layer.eval()), inputs, dynamo=True, verbose=False, dynamic_shapes={"inputs": every_batch}
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise first_cause(error) from None
    others = row.inputs(9)
    session = onnx.ReferenceEvaluator(program.model_proto)
    names = [each.name for each in program.model_proto.graph.input]
    (out,) = session.run(None, dict(zip(names, (each.numpy() for each in others), strict=True)))
    torch.testing.assert_close(torch.from_numpy(out), first_output(layer(*others)), rtol=1e-4, atol=1e-5)


def first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


FEATURES: dict[str, Callable[[Row], None]] = {
    "autocast": try_autocast,
    "second derivatives": try_double_backward,
    "functional_call": try_functional_call,
    "func.grad": try_grad,
    "func.vjp": try_vjp,
    "func.jvp, forward_ad": try_jvp,
    "func.vmap": try_vmap,
    "meta device": try_meta,
    "FakeTensorMode": try_fake,
    "FlopCounterMode": try_flops,
    "jit.trace": try_trace,
    "jit.script": try_script,
    "onnx.export": try_onnx,
}
"""By their names in the table, those that every layer is tried with here."""
ELSEWHERE = {
    "torch.compile": "tests/kernels/test_compile.py",
    "torch.export": "tests/kernels/test_export.py",
    "AOTInductor": "tests/kernels/test_export.py",
}
"""Tests of all rows of layer_table.py."""
REFUSALS = {
    "reference": 'need backend="reference"',
    "refused": "TorchScript and ONNX have no fused operators",
}
"""By what a cell says, the message of a kernel that is named."""


def table() -> dict[str, dict[str, str]]:
    """Of the page: by feature what it says of every layer."""
    text = PAGE.read_text(encoding="utf-8").partition("## Feature by layer")[2]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)]
    features = [cell.strip("`") for cell in lines[0][1:]]
    return {
        feature: {line[0].strip("`"): line[number] for line in lines[2:]} for number, feature in enumerate(features, 1)
    }


def test_the_page_has_every_layer_and_every_feature():
    assert list(table()) == [*ELSEWHERE, *FEATURES]
    public = {name for name in layers.__all__ if issubclass(getattr(layers, name), nn.Module)}
    assert {row.layer for row in ROWS} == public
    for cells in table().values():
        assert set(cells) == public
        assert set(cells.values()) <= {"works", "–", *REFUSALS}
    for feature in ELSEWHERE:
        assert set(table()[feature].values()) == {"works"}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_cell_of_the_table(row, feature):
    said = table()[feature][row.layer]
    if said == "–":
        assert row.layer in WITHOUT_KERNELS
        return
    if said == "works":
        FEATURES[feature](row)
        return
    message = re.escape(REFUSALS[said])
    if said == "reference":
        FEATURES[feature](row)
        with pytest.raises(BackendUnavailable, match=message):
            FEATURES[feature](Row(row.layer, lambda: with_backend(row.make(), "cpp"), row.inputs))
        return
    with pytest.raises(BackendUnavailable, match=message):
        FEATURES[feature](row)


@pytest.mark.parametrize("row", [row for row in ROWS if row.layer not in WITHOUT_KERNELS], ids=str)
def test_a_trace_of_the_reference_takes_other_batches(row):
    try_trace(Row(row.layer, lambda: with_backend(row.make(), "reference"), row.inputs))


def counted(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "of_input"),
    [
        ("GroupedMLP", False),
        ("GroupedMLP", True),
        ("MixtureOfExperts", False),
        ("MixtureOfExperts", True),
        ("MultiBranchMLP-no_mutual", True),
    ],
)
def test_flops_without_a_mutual_unit_are_those_of_plain_pytorch(name, of_input):
    layer, (x, *rest) = next(row for row in ROWS if str(row) == name)(7)
    x.requires_grad_(of_input)
    counts = [forward_and_backward(with_backend(layer, backend), x, *rest) for backend in ("cpp", "reference")]
    assert counts[0] == counts[1]


def forward_and_backward(layer: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    outputs: list[Tensor] = []
    forward = counted(lambda: outputs.append(first_output(layer(*inputs))))
    return forward, counted(lambda: outputs[0].sum().backward())


def test_flops_of_a_trunk_with_units_in_both_layers():
    rows, networks, local, glob, width, aux = 5, 3, 4, 2, 6, 7
    layer = layers.MultiBranchMLP(networks, local, glob, (width, width), (aux, aux), (1, 2), backend="cpp")
    inputs = torch.randn(rows, local), torch.randn(rows, glob), torch.randint(networks, (rows,))
    auxiliary = glob * aux + aux * aux
    own = (local + aux) * width + (width + aux) * width
    units = 2 * (width * width + 2 * 2 * width)
    # Of the first layer the whole table: three gates, three pairs of branches, two rows of two summands.
    table = 3 * width * width + 3 * width + 4 * width
    assert counted(lambda: layer(*inputs)) == 2 * rows * (auxiliary + networks * own + units + table)
    output = layer(*inputs)
    units_backward = 2 * (2 * width * width + 4 * 2 * width)
    # x_local and x_global need no gradient.
    backward = 2 * auxiliary - glob * aux + 2 * own - local * width + units_backward
    assert counted(lambda: (output.own.sum() + output.aux.sum()).backward()) == 2 * rows * backward
    output = saml_kernels.multi_branch(*inputs, layer.params(), recompute=True, backend="cpp")
    again = networks * own + table
    assert counted(lambda: (output.own.sum() + output.aux.sum()).backward()) == 2 * rows * (backward + again)


def test_flops_of_the_mutual_unit_alone():
    rows, networks, width = 5, 3, 6
    unit = layers.MutualUnit(networks, width, backend="cpp")
    v, scenario = torch.randn(rows, networks, width), torch.randint(networks, (rows,))
    assert counted(lambda: unit(v, scenario)) == 2 * rows * (width * width + 2 * 2 * width)
    out = unit(v, scenario)
    assert counted(lambda: out.sum().backward()) == 2 * rows * (2 * width * width + 4 * 2 * width)


def test_every_tower_on_every_row_counts():
    rows, networks = 5, 3
    weights, biases = [torch.randn(networks, 4, 6)], [torch.randn(networks, 6)]
    call = (torch.randn(rows, 4), torch.randint(networks, (rows,)), weights, biases)
    assert counted(lambda: saml_kernels.branch_scores(*call, backend="cpp")) == 2 * rows * networks * 4 * 6


def test_names_in_profiles_and_graphs():
    layer, inputs = next(row for row in ROWS if row.layer == "MultiBranchMLP")(8)
    out = layer(*inputs).own
    assert out.grad_fn.name() == "FusedTrunkBackward"
    with torch.profiler.profile() as profile:
        layer(*inputs).own.sum().backward()
    names = {event.name for event in profile.events()}
    assert {
        "FusedTrunk",
        "FusedTrunkBackward",
        "saml_kernels::group_by_scenario",
        "saml_kernels::trunk_forward",
        "saml_kernels::trunk_backward",
        "saml_kernels::trunk_weight_gradients",
    } <= names


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.layer not in WITHOUT_KERNELS], ids=str)
def test_onnx_of_the_reference_takes_other_batches(row):
    try_onnx(Row(row.layer, lambda: with_backend(row.make(), "reference"), row.inputs))


def test_the_older_exporter_for_onnx_is_refused_by_the_name_of_what_works(tmp_path):
    layer, inputs = next(row for row in ROWS if row.layer == "GroupedMLP")(8)
    with pytest.raises(BackendUnavailable, match=r"have no fused operators: use torch\.export"):
        torch.onnx.export(layer, inputs, str(tmp_path / "layer.onnx"), dynamo=False)
