"""What the one launch rests on: whatever an item waits for has a smaller number. Needs no Triton."""

import dataclasses
import itertools

import pytest
import torch

from saml_kernels.backends.triton import configs, schedule, trunk
from saml_kernels.backends.triton.configs import Config

CONFIG = Config(64, 64, 32, 4, 3)
SCENARIOS = ((300, 200, 140), (0, 700, 1), (1, 1, 1), (64, 128, 0), (0, 0, 5), (63, 65, 640))


def ordered(stages, programs, config=CONFIG):
    tiles = (configs.tile(stage, config, torch.bfloat16, True, "ieee") for stage in stages)
    cut = [dataclasses.replace(stage, tile=tile) for stage, tile in zip(stages, tiles, strict=True)]
    return schedule.order(cut, list(range(len(cut))), config.block_m, 3, programs)


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
