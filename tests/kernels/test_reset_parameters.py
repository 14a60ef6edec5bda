"""reset_parameters gives every layer the start of a new one, also where it was made without memory."""

import pytest
import torch
from layer_table import ROWS

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_reset_layer_is_a_new_one(row):
    new, _ = row(1)
    layer, _ = row(1, seed=1)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(7)
    torch.manual_seed(0)
    layer.reset_parameters()
    for name, tensor in new.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name
