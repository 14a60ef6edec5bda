"""torch.export of every layer, of any batch size, saved and loaded; and packages of AOTInductor."""

import inspect
import io

import pytest
import torch
from layer_table import ROWS, first_output, rows_of
from torch import Tensor, nn

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "strict"])
@pytest.mark.parametrize("row", rows_of(quick=("MultiBranchMLP", "GroupedMLP-one_layer")))
def test_an_exported_layer_takes_any_batch_size(row, strict):
    layer, inputs = row(4)
    layer.eval()
    batch = torch.export.Dim("B")
    shapes = {name: {0: batch} for name in list(inspect.signature(layer.forward).parameters)[: len(inputs)]}
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, inputs, dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (1, 2, 7, 100):
        inputs = row.inputs(rows)
        torch.testing.assert_close(first_output(loaded(*inputs)), first_output(layer(*inputs)))


class EveryLayer(nn.Module):
    """All rows of the table side by side: compiling them costs what compiling one costs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(row(4)[0].eval() for row in ROWS)

    def forward(self, inputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [first_output(layer(*each)) for layer, each in zip(self.layers, inputs, strict=True)]


@pytest.mark.slow
def test_aotinductor_packages_every_layer(tmp_path):
    model = EveryLayer()
    batch = torch.export.Dim("B")

    def inputs(rows: int) -> list[tuple[Tensor, ...]]:
        return [row.inputs(rows) for row in ROWS]

    shapes = {"inputs": [tuple({0: batch} for _ in each) for each in inputs(4)]}
    program = torch.export.export(model, (inputs(4),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layers.pt2"))
    packaged = torch._inductor.aoti_load_package(package)
    for rows in (1, 2, 7, 100):
        given = inputs(rows)
        for row, found, expected in zip(ROWS, packaged(given), model(given), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, row=row: f"{row}: {text}"
            )
