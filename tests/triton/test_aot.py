"""Every Triton kernel, compiled ahead of time for GPUs that are not there.

    pytest -m aot

Needs a process without TRITON_INTERPRET. Numbers are for test_interpreter.py.
"""

import sys
from pathlib import Path

import pytest
import torch

from saml_kernels.backends.triton import availability

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(availability.INTERPRETED, reason="TRITON_INTERPRET replaces the compiler"),
]

sys.path.insert(0, str(Path(__file__).parent))
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRODUCTS = ("product", "weight_gradient")


@pytest.fixture(scope="module")
def aot():
    """Imported late: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    import aot

    return aot


def check(report, launch, chip):
    assert report.spilled_bytes == 0
    assert report.registers is not None
    assert 0 < report.registers <= 512
    assert report.shared_memory <= chip.shared_memory
    sixteen_bit = dict(launch.signature).get("a") in ("*bf16", "*fp16")
    if launch.name.startswith(PRODUCTS) and sixteen_bit:
        assert report.tensor_core


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_kind_of_kernel_compiles(aot, dtype, chip):
    """No spills, shared memory within the chip's, matrix instructions where the factors have 16 bits."""
    page = aot.PAGE.read_text(encoding="utf-8")
    for name, launch in aot.representatives(dtype).items():
        report = aot.compile_for(launch, aot.CHIPS[chip])
        check(report, launch, aot.CHIPS[chip])
        # The documented table has this kernel with these numbers.
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | {aot.TYPES[dtype]} |")]
        cell = row.split("|")[3 + CHIPS.index(chip)].strip()
        assert cell.startswith(f"{report.registers} / {report.shared_memory / 1024:.0f}"), (name, chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_launch_of_a_training_step_compiles(aot, chip):
    """Another architecture: widths that are no multiple of a tile, as many branches as there may be."""
    for launch in aot.recorded(torch.float16, (72, 100), 64):
        check(aot.compile_for(launch, aot.CHIPS[chip]), launch, aot.CHIPS[chip])


def test_the_launches_are_those_of_the_documentation(aot):
    """Distinct compilations, which the batch size does not multiply."""
    assert len(aot.recorded(torch.bfloat16)) == len(set(aot.recorded(torch.bfloat16)))
    assert {launch.name for launch in aot.recorded(torch.bfloat16)} == {
        "product_kernel",
        "own_row_kernel",
        "table_kernel",
        "own_row_backward_kernel",
        "activation_backward_kernel",
        "weight_gradient_kernel",
    }
