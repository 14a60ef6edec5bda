"""What loops of the compiled kernels cost: upper bounds, so that a change that makes them dearer is seen without a GPU.

    pytest -m aot tests/triton/test_costs.py

docs/gpu-kernels.md says what each number was predicted to be, and what it was before.
"""

import json
import sys
from pathlib import Path

import pytest

from saml_kernels.backends.triton import availability

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(availability.INTERPRETED, reason="TRITON_INTERPRET replaces the compiler"),
]

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def costs():
    """Imported late: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    import costs

    if costs.aot.documented_triton(costs.aot.PAGE.read_text(encoding="utf-8")) != costs.triton.__version__:
        pytest.skip("instructions are counted with the Triton that docs/gpu-kernels.md names")
    return costs


# (M, schedule, a stage, rows of its tile): instructions and barriers at most of a step over k, share of issue slots.
STEPS = {
    (8, "persistent", "V0", 64): (130, 2, 0.51),
    (8, "persistent", "X0", 64): (132, 2, 1.04),
    (8, "persistent", "d_branch_weight1", 128): (155, 2, 0.61),
    (8, "persistent", "d_branch_weight0", 128): (208, 2, 0.82),
    (8, "per_layer", "V0", 256): (92, 2, 0.36),
    (8, "per_layer", "V1", 64): (130, 2, 0.51),
    (32, "persistent", "V0", 64): (130, 2, 0.51),
    (32, "persistent", "X0", 64): (215, 2, 1.08),
    (32, "per_layer", "V0", 256): (94, 2, 0.37),
}
# The same of a row, all warps together.
ROWS = {
    (8, "persistent", "M0", 16): (1200, 2),
    (8, "persistent", "B0", 16): (1700, 6),
    (8, "per_layer", "M0", 16): (1200, 2),
    (32, "persistent", "M0", 8): (4500, 33),
    (32, "persistent", "B0", 8): (6500, 72),
}


def found(costs, M, schedule, stage, rows):
    """Launches that run the stage with such a tile, and its body in them."""
    places = [
        (launch, body)
        for launch in costs.listed()
        if (launch.M, launch.schedule) == (M, schedule)
        for body in launch.bodies
        if stage in body.stages and getattr(body.tile, "block_m", getattr(body.tile, "rows", None)) == rows
    ]
    assert places
    return places


@pytest.mark.parametrize(("place", "limits"), STEPS.items(), ids=str)
def test_a_step_of_a_product(costs, place, limits):
    instructions, barriers, share = limits
    for launch, body in found(costs, *place):
        assert 0 < body.repeated.instructions <= instructions
        assert body.repeated.barriers <= barriers
        assert body.share_of_issue(launch.num_warps) <= share
        assert body.repeated.matrix


@pytest.mark.parametrize(("place", "limits"), ROWS.items(), ids=str)
def test_a_row_of_a_mutual_unit(costs, place, limits):
    instructions, barriers = limits
    for launch, body in found(costs, *place):
        assert 0 < body.repeated.instructions * launch.num_warps <= instructions
        assert body.repeated.barriers * launch.num_warps <= barriers


def test_sums_of_a_mutual_unit_stay_within_a_warp(costs):
    """The loops over blocks of a forward have no barrier at M = 8: what is left are a group's few."""
    (forward, *_) = costs.aot.recorded(costs.torch.bfloat16, costs.aot.Trunk(), "persistent")
    loops = [
        loop
        for loop in costs.aot.disassembled(forward, costs.CHIP).all_loops()
        if not loop.inner and {"mutual.py"} <= {each.file for each in loop.own}
    ]
    assert len(loops) == 2
    assert not any(costs.count(loop.own, costs.BARRIER) for loop in loops)


def test_no_listed_launch_spills(costs):
    assert not [launch for launch in costs.listed() if launch.report.spilled_bytes]


def test_the_committed_numbers_are_these(costs):
    """Of benchmarks/results/gpu_assembly.json, which the model of the schedule reads, and of the page's table."""
    check_committed(costs, costs.listed())


@pytest.mark.slow
def test_those_of_every_candidate_as_well(costs):
    """None of which spills."""
    launches = costs.every_candidate()
    assert not [launch for launch in launches if launch.report.spilled_bytes]
    assert check_committed(costs, launches) == len(launches)


def check_committed(costs, launches):
    """Every one of them is in the file, which has the same head; the number of the file's."""
    committed = json.loads(costs.RESULT.read_text(encoding="utf-8"))
    fresh = json.loads(json.dumps(costs.result(launches)))
    there, here = committed.pop("launches"), fresh.pop("launches")
    assert committed == fresh
    for new in here:
        assert any(agree(old, new) for old in there), new
    return len(there)


def agree(old, new):
    """Equal, but for instructions: the compiler's own order varies them a little from run to run."""
    if isinstance(old, dict):
        return old.keys() == new.keys() and all(
            abs(old[name] - new[name]) <= 0.02 * old[name] if name == "instructions" else agree(old[name], new[name])
            for name in old
        )
    if isinstance(old, list):
        return len(old) == len(new) and all(map(agree, old, new))
    return old == new


def test_what_counts_as_the_same_numbers():
    one = {"step": {"instructions": 130, "barriers": 2}, "stages": ["V0"]}
    assert agree(one, {"step": {"instructions": 132, "barriers": 2}, "stages": ["V0"]})
    assert not agree(one, {"step": {"instructions": 134, "barriers": 2}, "stages": ["V0"]})
    assert not agree(one, {"step": {"instructions": 130, "barriers": 3}, "stages": ["V0"]})
    assert not agree(one, {"step": {"instructions": 130, "barriers": 2}, "stages": ["V1"]})


CODE = """
	//## File "/somewhere/kernels/first.py", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
	//## File "/somewhere/kernels/second.py", line 3
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
.L_x_2:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @P1 BRA `(.L_x_2) ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_4) ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   BRX R18 -0x2000                    (*"BRANCH_TARGETS .L_x_3,.L_x_1"*);
.L_x_3:
        /*0070*/                   EXIT ;
.L_x_4:
        /*0080*/                   WARPSYNC R3 ;
        /*0090*/                   BRA `(.L_x_1) ;
"""


def test_loops_are_those_of_the_control_flow():
    """Nested ones, a jump by a table; what only threads that have parted reach is left out."""
    from assembly import BARRIER, MATRIX, Code, count

    code = Code(CODE)
    (outer,) = code.loops
    (inner,) = outer.inner
    assert [each.text.split()[0] for each in outer.own] == ["HGMMA.64x128x16.F32.BF16", "BRA.DIV", "@!P0", "BRX"]
    assert [(each.file, each.line) for each in inner.own] == [("second.py", 3)] * 2
    assert (count(outer.every, MATRIX), count(outer.every, BARRIER), count(outer.own, BARRIER)) == (1, 1, 0)
    assert code.reached == frozenset(range(8))
