"""torch.export of every layer, of any batch size, saved and loaded."""

import inspect
import io

import pytest
import torch
from layer_table import first_output, rows_of

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
