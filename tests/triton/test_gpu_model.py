"""The model of the GPU launches: the simulation against what must hold of any, costs by hand, plans against launches.

Counts of machine code are made up here: nothing is compiled.
"""

import dataclasses
import heapq
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")
pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import gpu_model
import page
from on_gpu import assembly, costs, launches, model, model_page, peer_model
from on_gpu.chip import H100, PEER, Chip
from on_gpu.simulation import CAUSES, Cost, Task, overlapped, simulate
from saml_kernels.backends.triton import availability, configs
from saml_kernels.backends.triton.configs import Choice, Config
from workload import Cell, operations

pytestmark = pytest.mark.skipif(availability.INTERPRETED, reason="the interpreter runs other tiles")
ROOT = Path(__file__).parents[2]
LARGE = Choice("persistent", Config(128, 128, 64, 8, 3), *[Config(64, 128, 64, 8, 3)] * 2)
SMALL = Choice("persistent", *[Config(64, 64, 64, 4, 3, programs=2)] * 2, LARGE.weights)
"""Tiles of their own, so that what is built in may change."""


def entry(plan, M, instructions=100.0, registers=128, shared_memory=98304):
    """What the file of counts might say of a launch."""
    bodies = {}
    for stage in plan.stages:
        bodies.setdefault((type(stage).__name__, launches.cut_of(stage)), []).append(stage.name)
    counts = {"instructions": instructions, "barriers": 2}
    return {
        "M": M,
        "schedule": plan.schedule or "persistent",
        "title": plan.title,
        "registers": registers,
        "spilled_bytes": 0,
        "shared_memory": shared_memory,
        "num_warps": plan.config.num_warps,
        "num_stages": plan.config.num_stages,
        "item": counts,
        "bodies": [
            {"stages": names, "kind": kind, "once": counts}
            | ({"item_rows": cut[0], "rows": 4, "columns": 64, "row": counts} if len(cut) == 1 else {})
            | (dict(zip(assembly.BLOCKS, cut, strict=True)) | {"step": counts} if len(cut) > 1 else {})
            for (kind, cut), names in bodies.items()
        ],
    }


def written(path, entries):
    path.write_text(json.dumps({"command": "none", "chip": "sm_90", "type": "bf16", "launches": entries}))
    return path


def entries_of(choices, M):
    return [entry(plan, M) for choice in choices for plan in launches.plans(choice, M)]


@pytest.fixture
def counts(tmp_path):
    """Counts of every launch for M = 8."""
    return assembly.load(written(tmp_path / "counts.json", entries_of((SMALL, LARGE), 8)))


def tiles(seed, number=60, before=5.0):
    """Tasks of tiles of one to three, each tile after up to two earlier ones."""
    chance = random.Random(seed)
    found = []
    for tile in range(number):
        needs = tuple(chance.sample(range(tile), k=min(tile, chance.randrange(3))))
        for _ in range(chance.randrange(1, 4)):
            cost = overlapped(issue=chance.uniform(1, 50), l2=chance.uniform(1, 50), latency=chance.uniform(0, 20))
            found.append(Task(before * chance.random(), cost, tile, needs))
    return found


def length(task):
    return task.before + task.cost.alone


def longest_chain(tasks):
    """Cycles of the longest row of tasks that wait for each other; what comes before a wait overlaps with it."""
    ends = {}
    for task in tasks:
        start = max([task.before, *(ends[tile] for tile in task.needs)])
        ends[task.tile] = max(ends.get(task.tile, 0.0), start + task.cost.alone)
    return max(ends.values())


@pytest.mark.parametrize("seed", range(5))
def test_one_program_takes_the_sum_of_all_items(seed):
    tasks = tiles(seed)
    outcome = simulate(tasks, 1, 132)
    assert outcome.cycles == pytest.approx(sum(map(length, tasks)))
    assert outcome.spent["waiting"] == pytest.approx(0, abs=1e-6)
    assert outcome.spent["idle"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("seed", range(5))
def test_more_programs_share_the_work_but_not_the_longest_chain(seed, programs, ahead):
    tasks = tiles(seed)
    work, outcome = sum(map(length, tasks)), simulate(tasks, programs, programs, ahead=ahead)
    assert max(work / programs, longest_chain(tasks)) <= outcome.cycles * (1 + 1e-9)
    assert outcome.cycles <= work * (1 + 1e-9)
    assert sum(outcome.shares().values()) == pytest.approx(1)
    assert sum(outcome.spent.values()) == pytest.approx(programs * outcome.cycles)
    assert all(cycles >= -1e-6 for cycles in outcome.spent.values())


def test_with_a_program_for_every_task_only_the_longest_chain_counts():
    tasks = tiles(0)
    assert simulate(tasks, len(tasks), len(tasks)).cycles == pytest.approx(longest_chain(tasks))


@pytest.mark.parametrize("programs", [2, 5, 13])
def test_without_waits_it_is_list_scheduling(programs):
    tasks = [task._replace(needs=()) for task in tiles(1)]
    free = [0.0] * programs
    for task in tasks:
        heapq.heapreplace(free, free[0] + length(task))
    outcome = simulate(tasks, programs, programs)
    assert outcome.cycles == pytest.approx(max(free))
    assert outcome.spent["waiting"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("programs", "multiprocessors"), [(1, 1), (6, 6), (6, 3), (7, 2)])
def test_half_of_all_costs_is_half_of_the_time(programs, multiprocessors):
    tasks = [task._replace(noticed=3.0) for task in tiles(2)]
    halved = [
        task._replace(before=task.before / 2, noticed=task.noticed / 2, cost=task.cost.times(0.5)) for task in tasks
    ]
    whole, half = (simulate(each, programs, multiprocessors).cycles for each in (tasks, halved))
    assert half == pytest.approx(whole / 2)


def test_four_items_by_hand():
    """Two programs: a and b begin at 10 and run 100 and 30. c is drawn by the second at 40, can look at 50, waits
    until a is done at 110, goes on at 115 and ends at 135; d, drawn at 110, runs from 120 to 160.
    """
    issue, l2 = overlapped(issue=100), overlapped(l2=30)
    tasks = [
        Task(10, issue, "a"),
        Task(10, l2, "b"),
        Task(10, overlapped(tensor=20), "c", ("a", "b"), noticed=5),
        Task(10, Cost(latency=40), "d", ("a",), noticed=5),
    ]
    outcome = simulate(tasks, 2, 2)
    assert outcome.cycles == 160
    expected = {"issue": 100, "tensor": 20, "L2": 30, "latency": 40 + 4 * 10, "waiting": 65, "idle": 25}
    assert outcome.spent == expected
    assert set(outcome.spent) == set(CAUSES)


def test_drawn_ahead_by_hand():
    """The first program, busy up to 100, has the third task in hand, although the second is free at 10 and at 30."""
    tasks = [Task(0, Cost(cycles), str(cycles)) for cycles in (100, 10, 5, 20, 7)]
    assert simulate(tasks, 2, 2, ahead=True).cycles == 105
    assert simulate(tasks, 2, 2).cycles == 100
    begun = simulate(tasks, 2, 2, ahead=True, begin=50)
    assert begun.cycles == 155
    assert begun.spent["latency"] == 2 * 50 + 142


def test_what_ends_before_the_first_look_is_not_waited_for():
    tasks = [Task(0, Cost(20), "a"), Task(100, Cost(10), "b", ("a",), noticed=5)]
    outcome = simulate(tasks, 2, 2)
    assert outcome.cycles == 110
    assert outcome.spent["waiting"] == 0


def test_tasks_that_begin_one_after_another_on_one_multiprocessor_by_hand():
    """a has 50 left when b begins at 50, and ends at 150, b then 50; c begins at 160 and ends at 180, b at 210."""
    tasks = [Task(before, overlapped(issue=work), before) for before, work in ((0, 100), (50, 100), (160, 10))]
    assert simulate(tasks, 3, 1).cycles == pytest.approx(210)


def test_programs_of_one_multiprocessor_share_what_both_need():
    def both(*found):
        return simulate([Task(0, cost, number) for number, cost in enumerate(found)], len(found), 1).cycles

    busy, other, slow = overlapped(issue=100), overlapped(l2=100), overlapped(issue=50, latency=50)
    assert both(busy, busy) == pytest.approx(200)
    assert both(busy, busy, busy) == pytest.approx(300)
    assert both(busy, other) == pytest.approx(100)
    # Half of the schedulers' time each: the latency of one is the other's time.
    assert both(slow, slow) == pytest.approx(100)
    assert both(busy, slow) == pytest.approx(150)
    # The short one leaves after 60; what the long one has left runs alone.
    assert both(busy, overlapped(issue=30)) == pytest.approx(130)


def test_a_wait_for_what_no_earlier_task_does_is_an_error():
    with pytest.raises(ValueError, match="no earlier task"):
        simulate([Task(0, Cost(1), "a", ("b",)), Task(0, Cost(1), "b")], 1, 1)


def test_costs_one_after_another():
    """The slower of what overlaps counts; one after the other, all do."""
    first, second = overlapped(issue=30, l2=10, latency=5), overlapped(issue=10, tensor=40)
    found = first.then(second)
    assert found.alone == 75
    assert found.limited == (30, 40, 0)
    assert found.busy == (40, 40, 10)


def test_a_product_by_hand(counts):
    """A0 for 128 rows, (128, 256) by (256, 128): four steps of 64."""
    plan = launches.plans(LARGE, 8)[0]
    code = counts.launches[plan.wanted(8)]
    launched = costs.Launched(code, H100, costs.gathered(code, plan.stages), 3)
    cost = costs.item_cost(plan.stages[0], launched, 128, 0)
    moved = 2 * 256 * (128 + 128) / H100.l2_bytes
    stored = 2 * 128 * 128 / H100.l2_bytes
    assert cost.busy == pytest.approx((5 * 100 * 8 / 4, 128 * 128 * 256 / 2048, moved + stored))
    # The permutation, the pipeline's first tiles, bias; two barriers a step and two around.
    assert cost.latency == pytest.approx(3 * H100.l2_round_trip + 10 * H100.barrier)
    assert cost.limited == pytest.approx((0, 0, moved + stored))
    # With fewer rows products and instructions stay, rows are not read.
    fewer = costs.item_cost(plan.stages[0], launched, 1, 0)
    assert fewer.busy[:2] == pytest.approx(cost.busy[:2])
    assert fewer.busy[2] == pytest.approx((2 * 256 * 129 + 2 * 128) / H100.l2_bytes)


def test_tiles_that_come_late(counts):
    """Asked for two steps ahead, tiles of a weight's gradient come late; eight steps ahead they do not."""
    weights = launches.plans(LARGE, 8)[-1]
    tile = weights.stages[0].tile
    chip = dataclasses.replace(H100, barrier=0)
    code = counts.launches[weights.wanted(8)]
    launched = costs.Launched(code, chip, costs.gathered(code, weights.stages), 3)
    cost = costs.weight_cost(weights.stages[0], launched, 640, 1, True)
    moved = 2 * 640 * (tile.block_m + tile.block_n) / chip.l2_bytes
    around = max(2 * tile.block_m * tile.block_n / chip.l2_bytes, 200)
    # Permutation and first tiles, then ten steps.
    late = (10 * chip.l2_round_trip + moved) / 2
    assert cost.alone == pytest.approx(2 * chip.l2_round_trip + late + around)
    assert cost.busy[2] == pytest.approx(moved + 2 * tile.block_m * tile.block_n / chip.l2_bytes)
    deeper = costs.weight_cost(weights.stages[0], dataclasses.replace(launched, num_stages=9), 640, 1, True)
    products = 640 * tile.block_m * tile.block_n / chip.products
    assert deeper.alone == pytest.approx(2 * chip.l2_round_trip + max(moved, products) + around)


def test_stages_without_a_model_are_refused(counts):
    plan = launches.plans(LARGE, 8)[-1]
    launched = costs.Launched(counts.launches[plan.wanted(8)], H100, frozenset(), 3)
    with pytest.raises(TypeError, match="there is no model of WeightGradient"):
        costs.item_cost(plan.stages[0], launched, 128, 0)


@pytest.mark.parametrize(("B", "choice"), [(1024, SMALL), (1024, LARGE), (4096, LARGE)])
def test_the_tensor_cores_do_what_the_formulas_say(counts, B, choice):
    """Where tiles are whole, the model's products are the trunk's, but for the mutual unit's."""
    offsets = [*range(0, B + 1, B // 8)]
    cell = Cell(B, 8, launches.LOCAL, launches.LOCAL, launches.WIDTHS)
    d = launches.WIDTHS[0]
    scores, backward_scores = B * (2 * 15 * d + 2 * 7 * d), B * 4 * 7 * d
    found = {}
    for plan in launches.plans(choice, 8):
        tasks = launches.tasks(plan, counts.launches[plan.wanted(8)], H100, offsets)
        cycles = sum(task.cost.busy[1] for task in tasks)
        found[plan.schedule] = found.get(plan.schedule, 0) + 2 * H100.products * cycles
    needed = operations(cell)
    assert found["persistent"] == pytest.approx(needed.forward - scores)
    assert found["per_layer"] == pytest.approx(needed.forward - scores)
    assert found[None] == pytest.approx(needed.backward - backward_scores)


def test_the_peer_does_what_the_formulas_say():
    B, M, d = 4096, 8, launches.WIDTHS[0]
    needed = operations(Cell(B, M, launches.LOCAL, launches.LOCAL, launches.WIDTHS))
    scores, backward_scores = B * (2 * (2 * M - 1) * d + 2 * (M - 1) * d), B * 4 * (M - 1) * d
    biases = 2 * B * M * (sum(launches.WIDTHS) + d)
    assert sum(2 * each.products for each in peer_model.forward(B, M)) == needed.forward - scores
    assert sum(2 * each.products for each in peer_model.backward(B, M)) == needed.backward - backward_scores + biases
    # A product of 1024 multiplications a number takes as long as it multiplies, a copy as long as it moves.
    peak = H100.products * H100.multiprocessors * H100.clock
    large = peer_model.product("large", 8192, 8192, 8192)
    assert large.seconds(H100, PEER) == pytest.approx(8192**3 / (0.7 * peak) + H100.launch)
    copied = peer_model.Operation("copy", numbers=1e9)
    assert copied.seconds(H100, PEER) == pytest.approx(2e9 / H100.memory + H100.launch)


def test_programs_beside_each_other():
    assert H100.beside(registers=244, shared_memory=98304, warps=8) == 1
    assert H100.beside(registers=126, shared_memory=49152, warps=8) == 2
    assert H100.beside(registers=32, shared_memory=150000, warps=4) == 1
    assert H100.beside(registers=16, shared_memory=0, warps=32) == 2
    # Registers are given out in eights.
    assert H100.beside(registers=33, shared_memory=0, warps=8) == 6


def test_a_launch_with_a_counter_has_as_many_programs_as_configured(counts):
    plans = launches.plans(LARGE, 8)
    for plan in plans:
        code = dataclasses.replace(counts.launches[plan.wanted(8)], registers=64, shared_memory=1024)
        assert launches.programs_beside(plan, code, H100) == (plan.config.programs if plan.waits else 4)
    assert {plan.title for plan in plans if plan.waits} == {"forward", "rest of the forward", "chain"}


def test_what_comes_before_an_item_by_hand(counts):
    """A0 waits for nothing, V0 for a tile, G0 for one or more; with a launch of its own, V0 for a program to start."""
    around = 100 * 8 / 4 + 2 * H100.barrier
    offsets = [*range(0, 4097, 512)]
    plans = {plan.title: plan for plan in launches.plans(LARGE, 8)}
    found = {}
    for title in ("forward", "V0", "weights"):
        for task in launches.tasks(plans[title], counts.launches[plans[title].wanted(8)], H100, offsets):
            found.setdefault((title, task.tile and task.tile[0]), task)
    assert found["forward", "A0"].before == found["forward", None].before == pytest.approx(around)
    assert found["forward", "V0"].before == pytest.approx(around + H100.atomic_round_trip)
    assert found["forward", "V0"].needs == (("A0", 0),)
    assert found["forward", "G0"].before == pytest.approx(around + H100.atomic_round_trip)
    assert found["V0", "V0"].before == pytest.approx(around + H100.block_start)
    assert found["weights", "biases"].before == pytest.approx(around + H100.block_start + H100.l2_round_trip)
    # After an item's stores comes a fence, where others wait for it.
    alone = [found[title, "V0"].cost.latency for title in ("forward", "V0")]
    assert alone[0] - alone[1] == pytest.approx(H100.fence)
    # Offsets and the first ticket.
    begin = H100.l2_round_trip + H100.atomic_round_trip
    assert [launches.begin(plans[title], H100) for title in ("forward", "V0", "weights")] == [begin, 0, 0]


@pytest.mark.parametrize("M", [8, 32])
def test_the_mutual_unit_by_hand(M, tmp_path):
    """Four rows at a time, 512 columns in 8 blocks, read twice."""
    plans = {plan.title: plan for plan in launches.plans(LARGE, M)}
    found = assembly.load(written(tmp_path / "counts.json", [entry(plan, M) for plan in plans.values()]))
    streams = 2 * 2 * (M + 1) * 512 + 4 * M
    read = {
        # Gate and result.
        "M0": (plans["forward"], 16, streams + 2 * (512 + 512)),
        # The permutation for α; dM twice and dV_t in float32, the gate twice and its gradient.
        "B0": (plans["chain"], 17, streams + 4 * 512 * 3 + 2 * 512 * 3),
    }
    for name, (plan, trips, moved) in read.items():
        stage = next(stage for stage in plan.stages if stage.name == name)
        rows = stage.tile.item_rows
        launched = costs.Launched(found.find([plan.wanted(M)]), H100, frozenset(), 3)
        cost = costs.item_cost(stage, launched, 128, 0)
        assert cost.latency == pytest.approx(rows / 4 * trips * H100.l2_round_trip + (rows + 1) * 2 * H100.barrier)
        assert cost.busy == pytest.approx(((rows + 1) * 100 * 8 / 4, 0, rows * moved / H100.l2_bytes))
        # An item of a tile's last rows runs as long, and moves nothing where it has none.
        empty = costs.item_cost(stage, launched, rows, 1)
        assert empty.latency == cost.latency
        assert empty.busy[2] == 0


def test_batches():
    even, skewed = (launches.batch(4096, 8, name) for name in model.DISTRIBUTIONS)
    assert even[0] == skewed[0] == 0
    assert even[-1] == skewed[-1] == 4096
    assert 400 < even[1] < 620 < 1300 < skewed[1] < 1700
    assert launches.batch.__wrapped__(4096, 8, "zipf") == skewed


@pytest.mark.parametrize(
    "rows", [(1024, 0, 0, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0, 0), (300, 1, 0, 77, 128, 129, 5, 0)]
)
def test_every_number_is_drawn_and_every_row_runs(counts, rows):
    offsets = [0, *itertools.accumulate(rows)]
    for plan in launches.plans(LARGE, 8):
        tasks = launches.tasks(plan, counts.launches[plan.wanted(8)], H100, offsets)
        assert simulate(tasks, 264, 132).cycles > 0
        if plan.of_weights:
            assert len(tasks) == 164 * (1 + 8)
            # An empty scenario's weights are zeros that somebody writes.
            present = sum(count > 0 for count in rows)
            tiles_of_weights, of_biases = 8 * (48 + 32 + 24 + 6) + 16 + 16 + 4, present * (4 + 4 + 2 + 1) + 4 + 2 + 1
            assert sum(task.cost.alone > 0 for task in tasks) == tiles_of_weights + of_biases
        elif plan.waits:
            assert {task.tile[0] for task in tasks if task.tile} == {stage.name for stage in plan.stages}
            assert any(task.tile is None for task in tasks)


def test_a_launch_is_never_faster_than_its_bytes(counts):
    plan = next(plan for plan in launches.plans(LARGE, 8) if plan.title == "V0")
    offsets = launches.batch(4096, 8, "uniform")
    code = counts.launches[plan.wanted(8)]
    weights = 8 * (768 + 1) * 512
    assert launches.moved_bytes(plan, 4096, 8) == 2 * (4096 * (256 + 512 + 8 * 512 + 512) + weights)
    fast = model.predict(plan, code, H100, offsets)
    slow = model.predict(plan, code, dataclasses.replace(H100, memory=1e11), offsets)
    assert fast.shares["memory"] == 0
    assert slow.seconds == pytest.approx(slow.bytes / 1e11 + H100.launch)
    for found in (fast, slow):
        assert set(found.shares) == set(model.LIMITS)
        assert sum(found.shares.values()) == pytest.approx(1)


def test_every_tensor_has_a_size():
    for M in model.SCENARIOS:
        for candidates in launches.candidates(1024, M):
            assert len({plan.wanted(M) for plan in candidates}) == len(candidates)
            assert all(launches.moved_bytes(plan, 1024, M) > 0 for plan in candidates)


@pytest.mark.parametrize("schedule", configs.SCHEDULES)
def test_the_plans_are_the_launches(schedule):
    """As a step of the trunk makes them: stages, tiles, order."""
    sys.path.insert(0, str(Path(__file__).parent))
    import aot

    recorded = [each.plan for each in aot.recorded(torch.bfloat16, aot.Trunk(), schedule)]
    plans = [plan for plan in launches.plans(launches.built_in(4096, 8), 8) if plan.schedule in (schedule, None)]
    assert len(recorded) == len(plans)
    for launch, plan in zip(recorded, plans, strict=True):
        assert launch.stages.value == len(plan.stages)
        tiles = [body.stage.value.tile.value for body in launch.bodies.value]
        fields = [assembly.BLOCKS if hasattr(tile, "block_k") else ("item_rows",) for tile in tiles]
        cuts = {tuple(getattr(tile, name).value for name in names) for tile, names in zip(tiles, fields, strict=True)}
        assert cuts == {launches.cut_of(stage) for stage in plan.stages}
        if not plan.of_weights:
            assert launch.persistent.value == plan.waits
            most = 132 * plan.config.programs if plan.waits else 1
            order = launches.schedule.order(plan.stages, [0] * len(plan.stages), plan.config.block_m, 8, most)
            for name in ("items_per_step", "own_items_per_step", "any_rows_lag", "own_lag", "block_m"):
                assert getattr(launch, name).value == getattr(order, name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there is no .*counts\.json; python tests/triton/costs\.py writes it"),
        ("{", "is not JSON"),
        ("{}", "is not of the form"),
        ('{"launches": [{"M": 8}]}', "is not of the form"),
        ('{"launches": []}', r"has no launch of M = 8 with \d+ warps and \d+ stages: A0 .*costs\.py writes it"),
    ],
)
def test_files_that_are_not_counts(tmp_path, text, message):
    path = tmp_path / "counts.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(assembly.AssemblyError, match=message):
        assembly.load(path, model.needed([1024], [8]))
    outcome = CliRunner().invoke(gpu_model.main, ["--assembly", str(path), "--out", str(tmp_path / "out.json")])
    assert outcome.exit_code == 1
    assert outcome.output.startswith("Error: ")


def test_a_missing_launch_is_named(tmp_path):
    entries = [each for each in entries_of([launches.built_in(4096, 8)], 8) if each["title"] != "chain"]
    with pytest.raises(
        assembly.AssemblyError, match=r"has no launch of M = 8 with \d+ warps and \d+ stages: B0 \d+, D "
    ):
        assembly.load(written(tmp_path / "counts.json", entries), model.needed([1024], [8]))


def test_the_same_tiles_with_other_warps_are_another_launch(tmp_path):
    fewer = dataclasses.replace(LARGE.backward, num_warps=4, programs=2)
    plans = [launches.plans(dataclasses.replace(LARGE, backward=each), 8)[-2] for each in (LARGE.backward, fewer)]
    assert [plan.tiles for plan in plans] == ["64×128×64, 8, 3", "64×128×64, 4, 3"]
    found = assembly.load(written(tmp_path / "counts.json", [entry(plan, 8) for plan in plans]))
    assert [found.find([plan.wanted(8)]).num_warps for plan in plans] == [8, 4]


def test_the_command_fills_the_page(tmp_path, monkeypatch):
    """With counts of large tiles only, which the batch of 1024 rows then gets, and says so."""
    monkeypatch.setattr(launches, "built_in", lambda rows, M: SMALL if rows <= 1024 else LARGE)
    monkeypatch.setattr(model, "ROWS", (1024,))
    monkeypatch.setattr(model, "SCENARIOS", (8,))
    monkeypatch.setattr(model, "SENSITIVE", ((1024, 8),))
    counts, out, path = (
        written(tmp_path / "counts.json", entries_of([LARGE], 8)),
        tmp_path / "out.json",
        tmp_path / "p.md",
    )
    shown = (ROOT / "docs" / "gpu-model.md").read_text(encoding="utf-8")
    path.write_text(shown, encoding="utf-8")
    arguments = ["--assembly", str(counts), "--out", str(out), "--page", str(path)]
    assert CliRunner().invoke(gpu_model.main, arguments, catch_exceptions=False).exit_code == 0
    record, text = json.loads(out.read_text()), path.read_text(encoding="utf-8")
    assert record["kind"] == "predicted by a model; nothing was measured"
    assert record["assembly"] == {"command": "none", "chip": "sm_90", "type": "bf16"}
    assert not any(cell["built_in_tiles"] for cell in record["cells"])
    assert all(f"<!-- {name} -->\n{each}<!-- end -->" in text for name, each in model_page.texts(record).items())
    assert "| 1024 | 8 | uniform | " in text
    assert " † | " in text
    assert {each["guess"] for each in record["sensitivity"]} == set(Chip().guesses())
    assert "Not predicted yet" not in text
    forward = record["cells"][0]["forward"]
    launched = [each for each in record["cells"][0]["launches"] if each["schedule"] == "per_layer"]
    assert forward["per_layer"] == pytest.approx(sum(each["us"] for each in launched) + 1e6 * H100.launch, abs=0.1)
    path.write_text(shown, encoding="utf-8")
    assert CliRunner().invoke(gpu_model.main, ["--render", *arguments[2:]], catch_exceptions=False).exit_code == 0
    assert path.read_text(encoding="utf-8") == text


def test_the_page_says_first_that_nothing_was_measured_and_shows_every_assumption():
    text = (ROOT / "docs" / "gpu-model.md").read_text(encoding="utf-8")
    assert text.splitlines()[2].startswith("**Nothing on this page was measured.**")
    assumed = model_page.assumptions({"chip": dataclasses.asdict(H100), "peer": dataclasses.asdict(PEER)})
    assert page.fill(text, {"assumptions": assumed + "\n"}) == text, "run: python benchmarks/gpu_model.py"


def test_the_page_shows_the_committed_result():
    record = json.loads(gpu_model.RESULT.read_text(encoding="utf-8"))
    text = gpu_model.PAGE.read_text(encoding="utf-8")
    assert page.fill(text, model_page.texts(record)) == text, "run: python benchmarks/gpu_model.py"
