"""torch.compile of every layer: whole, and in at most two graphs, one of them for a single row."""

import logging
from collections.abc import Iterator

import pytest
import torch
from layer_table import ROWS, first_output, rows_of
from problems import assert_close
from torch._dynamo.utils import counters
from torch.func import grad, jvp, vjp, vmap

from saml_kernels.layers import MultiBranchMLP

pytestmark = pytest.mark.cpu

SIZES = (1, 2, 7, 33, 64, 100, 101, 102, 1000)
every_layer = pytest.mark.parametrize("row", rows_of())


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest records every level, and with it a record of each of the compiler's steps, which takes most of the time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def step(function, layer, inputs):
    """Output and every gradient of a forward and a backward pass."""
    layer.zero_grad()
    x, *rest = inputs
    x = x.clone().requires_grad_()
    out = first_output(function(x, *rest))
    out.square().sum().backward()
    return {"out": out.detach(), "∂x": x.grad} | {f"∂{name}": p.grad for name, p in layer.named_parameters()}


TRANSFORMS = {
    "grad": lambda function, x: grad(lambda x: function(x).square().sum())(x),
    "vjp": lambda function, x: vjp(function, x)[1](torch.ones_like(function(x)))[0],
    "jvp": lambda function, x: jvp(function, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda function, x: vmap(function)(torch.stack([x, 2 * x])),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("row", rows_of(quick=("GroupedMLP", "MultiBranchMLP")))
def test_transforms_are_compiled_with_the_layer(row, transform):
    """Batch norms in evaluation: in training they move statistics in place."""
    layer, (x, *rest) = row(6)
    layer.eval()

    def transformed(x):
        return TRANSFORMS[transform](lambda x: first_output(layer(x, *rest)), x)

    expected = transformed(x)
    torch.testing.assert_close(torch.compile(transformed, backend="eager", fullgraph=True)(x), expected)


def test_a_compiled_layer_inside_and_outside_of_a_transform():
    layer, (x, *rest) = next(row for row in ROWS if str(row) == "GroupedMLP")(6)
    compiled = torch.compile(layer, backend="eager")

    def loss(x):
        return compiled(x, *rest).square().sum()

    leaf = x.clone().requires_grad_()
    layer(leaf, *rest).square().sum().backward()
    for _ in range(2):
        torch.testing.assert_close(loss(x), layer(x, *rest).square().sum())
        torch.testing.assert_close(grad(loss)(x), leaf.grad)


def test_a_kernel_named_inside_a_compiled_transform_is_refused():
    layer, (x, *rest) = next(row for row in ROWS if str(row) == "GroupedMLP")(6)
    layer.backend = "cpp"
    compiled = torch.compile(lambda x: grad(lambda x: layer(x, *rest).sum())(x), backend="eager")
    with pytest.raises(Exception, match="need backend="):
        compiled(x)


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)], ids=["default", "dynamic"])
@every_layer
def test_batch_sizes_share_graphs_in_training(row, dynamic):
    layer, _ = row(1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
    for rows in (rows for rows in SIZES if rows >= row.least_rows):
        x, *rest = row.inputs(rows)
        first_output(compiled(x.requires_grad_(), *rest)).sum().backward()
    assert graphs() <= 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@every_layer
def test_batch_sizes_share_graphs_without_gradients(row, mode):
    layer, _ = row(1)
    compiled = torch.compile(layer.eval(), backend="eager", fullgraph=True)
    with mode():
        for rows in SIZES[1:]:
            inputs = row.inputs(rows)
            torch.testing.assert_close(first_output(compiled(*inputs)), first_output(layer(*inputs)))
    assert graphs() <= 2


@pytest.mark.parametrize("row", rows_of(quick=("GroupedMLP-one_layer",)))
def test_compiled_backward_equals_eager(row):
    layer, inputs = row(20)
    if str(row) == "PartitionedNorm":
        layer.eval()  # in training both passes would move its statistics
    eager = step(layer, layer, inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(step(compiled, layer, inputs), eager, 1e-6)


def test_inputs_that_are_the_same_tensor():
    torch.manual_seed(0)
    layer = MultiBranchMLP(3, 4, 4, (6, 3))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (5, 6, 7):
        x, scenario = torch.randn(rows, 4), torch.randint(3, (rows,))
        eager = step(lambda x, scenario: layer(x, x, scenario), layer, (x, scenario))
        assert_close(step(lambda x, scenario: compiled(x, x, scenario), layer, (x, scenario)), eager, 1e-6)
    assert graphs() <= 2


def test_compiled_code_refuses_a_bad_id():
    layer, (x, scenario) = next(row for row in ROWS if row.layer == "GroupedMLP")(8)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(ValueError, match="row 0 holds 3"):
        compiled(x, torch.full_like(scenario, 3))
