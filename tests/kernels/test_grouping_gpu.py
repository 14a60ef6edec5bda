"""The CUDA grouping kernel against a stable sort."""

import pytest
import torch

from saml_kernels import available_backends, group_by_scenario

pytest_plugins = ("on_gpu.limits",)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("time_limit"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scenarios", [1, 3, 64, 1000, 20000])
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 1000, 131072, 131073])
def test_agrees_with_a_stable_sort(rows, scenarios, dtype):
    assert available_backends("group_by_scenario")["cpp"] is None
    ids = torch.randint(0, scenarios, (2 * rows,), dtype=dtype)[::2]
    expected = group_by_scenario(ids, scenarios, backend="reference")
    grouping = group_by_scenario(ids.cuda(), scenarios, backend="cpp")
    for out, ref in zip(grouping, expected, strict=True):
        torch.testing.assert_close(out.cpu(), ref, rtol=0, atol=0)


# One launch, and beyond 131072 rows the device-wide sort. More counters than a block has threads, and none.
@pytest.mark.parametrize("counters", [0, 1, 5000])
@pytest.mark.parametrize("rows", [0, 1000, 131073])
def test_clears_counters(rows, counters):
    ids = torch.randint(0, 8, (rows,))
    permutation, offsets, cleared = torch.ops.saml_kernels.group_by_scenario_and_clear(ids.cuda(), 8, counters)
    expected, _, expected_offsets = group_by_scenario(ids, 8, backend="reference")
    for out, ref in ((permutation, expected), (offsets, expected_offsets)):
        torch.testing.assert_close(out.cpu(), ref, rtol=0, atol=0)
    assert torch.equal(cleared.cpu(), torch.zeros(counters, dtype=torch.int32))
