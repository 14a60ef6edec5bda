"""What the one launch rests on: whatever an item waits for has a smaller number. Needs no Triton.

At small sizes every division of rows among scenarios is tried, over the tables of real programs. Numbers of programs
and of scenarios then have no surprise left: more programs only make lags longer, and more scenarios are tried one by
one with the divisions that are extreme. test_races.py holds the kernel to the same items.
"""

import dataclasses
import itertools

import pytest
import torch

from saml_kernels.backends.triton import configs, schedule, trunk
from saml_kernels.backends.triton.configs import Config

CONFIG = Config(64, 64, 32, 4, 3)
SCENARIOS = ((300, 200, 140), (0, 700, 1), (1, 1, 1), (64, 128, 0), (0, 0, 5), (63, 65, 640))


def ordered(stages, programs, config=CONFIG, num_scenarios=3):
    tiles = (configs.tile(stage, config, torch.bfloat16, True, "ieee") for stage in stages)
    cut = [dataclasses.replace(stage, tile=tile) for stage, tile in zip(stages, tiles, strict=True)]
    return schedule.order(cut, list(range(len(cut))), config.block_m, num_scenarios, programs)


def programs_of_a_trunk(activation):
    shape = trunk.TrunkShape(
        num_scenarios=3,
        local_dim=64,
        global_dim=64,
        per_branch=False,
        widths=(128, 64, 64),
        aux_widths=(128, 64, 64),
        gates=(128, 64, 0),
        activations=(activation,) * 3,
        score="ratio",
    )
    return trunk.forward_program(shape, save=True), trunk.backward_program(shape, True, True)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("rows", SCENARIOS)
@pytest.mark.parametrize("programs", [1, 7, 264])
def test_what_an_item_waits_for_is_drawn_before_it(activation, rows, programs):
    offsets = [0, *itertools.accumulate(rows)]
    for program in programs_of_a_trunk(activation):
        order = ordered(program.stages, programs, Config(128, 64, 32, 4, 3))
        items = schedule.items(order, offsets)
        last = {}
        for item in items:
            last[item.stage, item.tile] = item.number
        waited = 0
        for item in items:
            for needed in schedule.waits_for(order, item, offsets):
                assert last[needed] < item.number
                waited += 1
        assert waited > 0


@pytest.mark.parametrize("rows", SCENARIOS)
def test_every_row_meets_every_part_of_every_stage_once(rows):
    offsets = [0, *itertools.accumulate(rows)]
    forward, _ = programs_of_a_trunk("relu")
    order = ordered(forward.stages, 7)
    seen = {}
    for item in schedule.items(order, offsets):
        for row in range(item.first, item.end):
            seen[item.stage, item.part, row] = seen.get((item.stage, item.part, row), 0) + 1
    parts = sum(slot.items for slot in order.slots)
    assert len(seen) == parts * offsets[-1]
    assert set(seen.values()) == {1}


def test_a_row_has_one_tile():
    offsets = (0, 3, 3, 10)
    assert [schedule.tile_of_row(offsets, row, 4) for row in range(10)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="row must be below 10, got 10"):
        schedule.tile_of_row(offsets, 10, 4)


def test_stages_stand_behind_what_they_wait_for():
    forward, _ = programs_of_a_trunk("relu")
    with pytest.raises(ValueError, match="comes before what it waits for"):
        ordered(forward.stages[::-1], 7)


def launches(num_scenarios):
    """(whether foreign streams are quantised, stages) of every launch that calls with so many scenarios make."""
    widths = {"widths": (64, 64, 64), "aux_widths": (64, 64, 64), "gates": (64, 64, 0)}
    common = {"num_scenarios": num_scenarios, "local_dim": 64, "global_dim": 64, "per_branch": False, "score": "ratio"}
    trunks = [
        trunk.TrunkShape(**common, **widths, activations=("gelu",) * 3),
        trunk.TrunkShape(**common, **widths, activations=("relu",) * 3, quantized=torch.int8),
        trunk.TrunkShape(
            **common, widths=(64, 64), aux_widths=(), gates=(0, 0), activations=("relu",) * 2, all_branches=True
        ),
    ]
    unit = trunk.UnitShape(num_scenarios, 64, 64, "ratio")
    programs = [(False, trunk.unit_forward_program(unit)), (False, trunk.unit_backward_program(unit))]
    for shape in trunks:
        quantized = shape.quantized is not None and num_scenarios > 1
        programs += [(quantized, trunk.forward_program(shape, save=save)) for save in (True, False)]
        if any(shape.gates):
            programs.append((quantized, trunk.forward_program(shape, save=False, again=True)))
        programs.append((False, trunk.backward_program(shape, True, True)))
    for quantized, program in programs:
        for name in ("per_layer",) if quantized else ("persistent", "per_layer"):
            for stages in schedule.split(program.stages, name):
                if len(stages) > 1:
                    yield quantized, stages


def orders(num_scenarios, rounds, block_m, lag_scenarios=None, least=1):
    """(whether quantised, table) of every launch with waits, each distinct table once, with tiles of so few rows.

    ``rounds``: steps of which running programs draw all items at once; 0: ``least`` programs run.
    """
    found = {}
    counted = num_scenarios if lag_scenarios is None else lag_scenarios
    for quantized, stages in launches(num_scenarios):
        for steps in rounds:
            once = ordered(stages, 1, num_scenarios=num_scenarios)
            order = ordered(stages, steps * once.items_per_step or least, num_scenarios=counted)
            found[dataclasses.replace(order, block_m=block_m, num_scenarios=num_scenarios)] = quantized
    return found.items()


def violations(order, offsets):
    """(item, what it waits for) where that is not drawn before; the number of waits."""
    last, first = {}, {}
    for item in schedule.items(order, offsets):
        last[item.stage, item.tile] = item.number
        # All items of a tile wait for the same, and the first of them has the smallest number.
        first.setdefault((item.stage, item.tile), item)
    waits = [(item, needed) for item in first.values() for needed in schedule.waits_for(order, item, offsets)]
    return [(item, needed) for item, needed in waits if last[needed] >= item.number], len(waits)


def divisions(rows, num_scenarios):
    """Every way in which so many rows may belong to scenarios, as offsets; those of chunks are among them."""
    for ends in itertools.combinations_with_replacement(range(rows + 1), num_scenarios - 1):
        yield [0, *ends, rows]


@pytest.mark.parametrize("num_scenarios", [1, 2, 3, 4])
def test_every_division_of_few_rows(num_scenarios):
    """With tiles of two rows: up to three tiles of any rows, and every way to cut them into tiles of one scenario."""
    waits = 0
    for order, _ in orders(num_scenarios, (0, 1, 2, 5), block_m=2):
        for rows in range(7):
            for offsets in divisions(rows, num_scenarios):
                wrong, count = violations(order, offsets)
                assert not wrong, offsets
                waits += count
    assert waits > 1000


def extremes(num_scenarios, block_m):
    """Rows of every scenario: none, those of one only, one or a tile and one of some or of all."""
    absent = [0] * num_scenarios
    yield absent
    for one in {0, num_scenarios // 2, num_scenarios - 1}:
        yield [*absent[:one], 3 * block_m + 1, *absent[one + 1 :]]
    yield [1] * num_scenarios
    yield [scenario % 2 for scenario in range(num_scenarios)]
    yield [(block_m + 1) * (scenario % 5 == 0) for scenario in range(num_scenarios)]
    yield [*absent[1:], 1]


def chunks(offsets, rows):
    """A batch's offsets as launches on so many rows of it see them, one after another."""
    for row0 in range(0, offsets[-1], rows):
        count = min(rows, offsets[-1] - row0)
        yield [min(max(offset - row0, 0), count) for offset in offsets]


@pytest.mark.parametrize("eighth", range(8))
def test_every_number_of_scenarios(eighth):
    block_m = 4
    for num_scenarios in range(1 + eighth, 65, 8):
        for order, _ in orders(num_scenarios, (0, 3), block_m):
            for rows in extremes(num_scenarios, block_m):
                offsets = [0, *itertools.accumulate(rows)]
                for part in (offsets, *chunks(offsets, 3 * block_m)):
                    assert not violations(order, part)[0], part


def test_without_the_longer_lag_an_item_waits_for_a_later_one():
    """A tile of any rows waits for tiles of one scenario with larger numbers, which only quantised launches have.

    Without any other lag, so that this one is seen at small sizes.
    """
    found = set()
    for num_scenarios in (2, 3, 4):
        for order, quantized in orders(num_scenarios, (0,), block_m=2, lag_scenarios=0, least=0):
            for offsets in divisions(6, num_scenarios):
                if violations(order, offsets)[0]:
                    found.add(quantized)
    assert found == {True}


def test_more_programs_only_make_lags_longer():
    """So what is ordered with few programs is with any number."""
    for _, stages in launches(3):
        tables = [ordered(stages, programs) for programs in (1, 2, 7, 100, 264, 5000)]
        for fewer, more in itertools.pairwise(tables):
            for stage, slot in enumerate(more.slots):
                assert slot.lag >= fewer.slots[stage].lag
                for after in (slot.after_1, slot.after_2):
                    if after >= 0:
                        behind = [order.slots[stage].lag - order.slots[after].lag for order in (fewer, more)]
                        assert 0 < behind[0] <= behind[1]
