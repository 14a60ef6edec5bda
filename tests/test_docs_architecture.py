"""The drawing of the one launch and the code beside it are what the schedule and the kernel are."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_schedule", DOCS / "draw_schedule.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_schedule"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["draw_schedule"]


def test_the_drawing_is_up_to_date(script):
    assert (DOCS / "figures" / "schedule.svg").read_text(encoding="utf-8") == script.drawing(), (
        "run python docs/draw_schedule.py"
    )


def test_the_code_beside_it_is_the_kernel_s(script):
    assert (DOCS / "architecture.md").read_text(encoding="utf-8") == script.page(), "run python docs/draw_schedule.py"
    for name in script.SHOWN:
        assert f"\ndef {name}(" in script.code()


def test_programs_run_one_item_at_a_time_and_wait_for_what_it_needs(script):
    cut, offsets = script.stages(), [0, *itertools.accumulate(script.ROWS)]
    order = script.schedule.order(cut, [0] * len(cut), script.CONFIG.block_m, len(script.ROWS), script.PROGRAMS)
    runs = script.timeline(order, cut, offsets)
    for program in range(script.PROGRAMS):
        mine = [run for run in runs if run.program == program]
        assert all(before.end <= after.start for before, after in itertools.pairwise(mine))
    for run in runs:
        for needed in script.schedule.waits_for(order, run.item, offsets):
            others = [other for other in runs if (other.item.stage, other.item.tile) == needed]
            assert len(others) == order.slots[needed[0]].items
            assert all(other.end <= run.start for other in others)
