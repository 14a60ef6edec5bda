"""The GPU benchmark's section on single launches, in Triton's interpreter: which there are; its times mean nothing.

TRITON_INTERPRET=1 pytest -m interpreter tests/triton/test_stage_timing.py
"""

import time

import pytest

from on_gpu.sections import Run, stages
from on_gpu.target import Target
from saml_kernels.backends.triton import availability

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

PASSES = ("forward", "backward", "weights")


def test_every_stage_is_timed_alone():
    found = {}
    stages(Run(Target(dry_run=True), compiled=False), time.monotonic() + 300, found.update)
    (cell,) = found["cells"]
    assert "failure" not in cell
    timed = {kind: [row.contender for row in cell["rows"] if row.measured == kind] for kind in PASSES}
    assert timed["forward"][:2] == ["persistent", "per_layer"]
    assert timed["forward"][2:] == ["A0 Layer", "V0 Layer", "G0 Layer", "M0 MutualOwnRow", "A1 Layer", "V1 Layer"]
    assert timed["backward"][0] == timed["weights"][0] == "persistent"
    assert "B0 MutualBackward" in timed["backward"]
    # A branch's and an auxiliary weight of two layers, and a gate's.
    assert len(timed["weights"]) == 1 + 2 * 2 + 1
    assert all(row.median > 0 for row in cell["rows"])
