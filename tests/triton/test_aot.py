"""Every Triton kernel, compiled ahead of time for GPUs that are not there.

    pytest -m aot

Needs a process without TRITON_INTERPRET. Numbers are for test_interpreter.py.
"""

import dataclasses
import itertools
import re
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


@pytest.fixture(scope="module")
def aot():
    """Imported late: Triton decides at import whether it interprets."""
    pytest.importorskip("triton")
    import aot

    return aot


def check(aot, launch, chip):
    """Shared memory within the chip's, matrix instructions where the factors have 16 or 8 bits; no spills.

    Registers are what the configurations were chosen for with one Triton; another need only compile them.
    """
    report = aot.compile_for(launch, chip)
    if aot.documented_triton(aot.PAGE.read_text(encoding="utf-8")) == aot.triton.__version__:
        assert report.spilled_bytes == 0, (aot.title(launch), chip.name)
    assert 0 < report.registers <= 512
    assert report.shared_memory <= chip.shared_memory, (aot.title(launch), chip.name)
    if aot.has_products(launch) and aot.type_of_factors(launch) != "*fp32":
        assert report.tensor_core, (aot.title(launch), chip.name)
    return report


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("eighth", range(8))
def test_listed_launches(aot, eighth, chip):
    """And the documented table says what this Triton gives, where it is the Triton the table was made with."""
    page = aot.PAGE.read_text(encoding="utf-8")
    documented = aot.documented_triton(page) == aot.triton.__version__
    for start, launches in list(aot.listing())[eighth::8]:
        chosen = launches[chip]
        if aot.unavailable(chosen, aot.CHIPS[chip]):
            continue
        check(aot, chosen, aot.CHIPS[chip])
        found = aot.cell(chosen, aot.CHIPS[chip])
        if documented:
            rows = [line.split("|") for line in page.splitlines() if line.startswith(start)]
            cells = [row[4 + CHIPS.index(chip)].strip() for row in rows]
            assert any(same_cell(found, cell) for cell in cells), (start, found, cells)


def same_cell(found, documented):
    """Equal, but for the main loop's instructions: the compiler's own order varies them by one from run to run."""
    numbers, expected = ([part for part in re.split(r"[ /]+", cell) if part] for cell in (found, documented))
    if len(numbers) < 4 or len(numbers) != len(expected):
        return found == documented
    loop, expected_loop = numbers.pop(2), expected.pop(2)
    return numbers == expected and abs(int(loop) - int(expected_loop)) <= 0.01 * int(expected_loop)


def test_what_counts_as_the_same_cell():
    assert same_cell("238 / 72 / 136 ●", "238 / 72 / 135 ●")
    assert same_cell("102 / 96 ●", "102 / 96 ●")
    for other in ("239 / 72 / 135 ●", "238 / 73 / 135 ●", "238 / 72 / 133 ●", "238 / 72 / 135", "238 / 72 ●", "–"):
        assert not same_cell("238 / 72 / 135 ●", other)


def odd_towers(aot):
    """A gate and experts of widths that are no multiple of a vector."""
    options = {"hidden_dims": (30, 21), "M": 3, "mutual_layers": (), "activation": "gelu"}
    return [aot.Trunk(gated=True, **options), aot.Trunk(experts=True, **options)]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_option_compiles(aot, chip):
    """Activations, scores, gates, views, types, as many branches as there may be, widths that are no multiple of 8."""
    trunks = [
        aot.Trunk(hidden_dims=(72, 104), M=64, mutual_layers=(0, 1), activation="silu", score="softmax"),
        aot.Trunk(hidden_dims=(30, 21), M=3, mutual_layers=(1,), activation="gelu", gate="scalar", per_branch=True),
        aot.Trunk(hidden_dims=(64, 1), M=5, mutual_layers=(), activation="tanh", all_branches=True),
        aot.Trunk(hidden_dims=(64, 32), M=1, activation="leaky_relu", per_branch=True),
        *odd_towers(aot),
    ]
    for trunk, schedule in itertools.product(trunks, ("persistent", "per_layer")):
        for launch in aot.recorded(torch.float16, trunk, schedule, chip=chip):
            check(aot, launch, aot.CHIPS[chip])


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu", "tanh", "identity"])
def test_no_option_spills_at_the_documented_shape(aot, activation, chip):
    """With the built-in choice: every activation, score and gate."""
    for score, gate in itertools.product(("ratio", "softmax"), ("vector", "scalar")):
        trunk = aot.Trunk(activation=activation, score=score, gate=gate)
        for launch in aot.recorded(torch.bfloat16, trunk, "persistent", chip=chip):
            check(aot, launch, aot.CHIPS[chip])


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_float32_spills_with_no_option(aot, chip):
    """The longest epilogues with every gate, odd widths, many branches."""
    trunks = [
        *(aot.Trunk(activation=activation, gate="scalar") for activation in ("gelu", "silu")),
        aot.Trunk(activation="gelu", score="softmax"),
        aot.Trunk(hidden_dims=(30, 21), M=3, mutual_layers=(1,), activation="gelu", gate="scalar", per_branch=True),
        aot.Trunk(global_dim=70),
        aot.Trunk(hidden_dims=(72, 104), M=64, mutual_layers=(0, 1), activation="silu", score="softmax"),
        aot.Trunk(hidden_dims=(64, 1), M=5, mutual_layers=(), activation="tanh", all_branches=True),
        *odd_towers(aot),
    ]
    for trunk in trunks:
        for launch in aot.recorded(torch.float32, trunk, "persistent", chip=chip):
            check(aot, launch, aot.CHIPS[chip])


def test_an_odd_width_costs_only_the_stages_that_read_it(aot):
    """A scalar gate, or 70 global features: the other products keep their tiles, and the launch its shared memory."""
    chip = aot.CHIPS["sm_90"]
    (whole, *_) = aot.recorded(torch.bfloat16, aot.Trunk(), "persistent")
    for trunk in (aot.Trunk(gate="scalar"), aot.Trunk(global_dim=70)):
        (odd, *_) = aot.recorded(torch.bfloat16, trunk, "persistent")
        report = check(aot, odd, chip)
        assert report.shared_memory == aot.compile_for(whole, chip).shared_memory
        cut = [aot.plain(body.stage.tile) for body in odd.plan.bodies]
        tiles = {(tile.block_m, tile.block_n, tile.block_k) for tile in cut if hasattr(tile, "block_m")}
        assert (64, 128, 64) in tiles
        assert len(tiles) > 1


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_configuration_compiles(aot, chip):
    """Of few rows, and what tuning may try: test_costs.py says that none of it spills on sm_90. Others may have less
    shared memory or registers: tuning passes by what does not run, and what spills is slow."""
    from saml_kernels.backends.triton import configs

    for dtype, rows in itertools.product((torch.bfloat16, torch.float32), (256, 65536)):
        chosen = configs.built_in(configs.Bucket.of(rows, 8, 512), dtype.itemsize, aot.CHIPS[chip].family)
        for config in {chosen.forward, chosen.backward}:
            for launch in aot.recorded(dtype, aot.Trunk(), "persistent", config):
                check_direction(aot, launch, chip, config, chosen)
    family = aot.CHIPS[chip].family
    built_in = configs.built_in(configs.Bucket.of(65536, 8, 512), 2, family)
    for part in ("forward", "backward", "weights", "layer"):
        for config in configs.candidates(part, 2, family):
            choice = dataclasses.replace(built_in, **{part: config})
            for launch in aot.recorded(torch.bfloat16, aot.Trunk(), "per_layer", choice, chip):
                aot.compile_for(launch, aot.CHIPS[chip])


def check_direction(aot, launch, chip, config, chosen):
    """A configuration is held to what it is chosen for."""
    wanted = chosen.backward if aot.title(launch) == "chain" else chosen.forward
    if launch.name != "persistent_kernel" or config == wanted:
        check(aot, launch, aot.CHIPS[chip])


def test_the_launches_are_those_of_the_documentation(aot):
    """Three kernels; distinct compilations, which the batch size does not multiply."""
    names = {launch.name for launch in aot.recorded(torch.bfloat16, aot.Trunk(foreign_dtype=torch.int8), "per_layer")}
    assert names == {"persistent_kernel", "weight_gradient_kernel", "quantize_weight_kernel"}
    assert len(aot.recorded(torch.bfloat16, aot.Trunk(), "persistent")) == 3
