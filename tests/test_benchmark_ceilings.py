"""What a processor can do at most: the loops, and the least time of a cell."""

from __future__ import annotations

import platform
import re

import click
import pytest

import ceilings
from workload import Cell, numbers_read, operations

CELL = Cell(B=10, M=4, local_dim=3, global_dim=5, hidden_dims=(8, 2))
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the loops are for x86-64")


def test_numbers_read() -> None:
    auxiliary = 6 * 8 + 9 * 2
    layer_one = 4 * (3 + 8 + 1) * 8
    own = 9 * 8 + (8 + 2 + 1) * 2
    assert numbers_read(CELL, 3) == auxiliary + layer_one + 3 * own
    assert ceilings.bytes_read(CELL, "float32", 3) == 4 * numbers_read(CELL, 3)
    assert ceilings.bytes_read(CELL, "bfloat16", 3) == 2 * numbers_read(CELL, 3)


def test_the_best_instructions_count() -> None:
    rates = {"float32 baseline": 1.0, "float32 avx2": 4.0, "int8 avx2": 3.0, "read": 99.0}
    assert ceilings.best_rate(rates, "float32") == 4
    assert ceilings.best_rate(rates, "float16") == 4
    assert ceilings.best_rate(rates, "int8") == 4, "int8 values can be multiplied as floats"
    rates |= {"bfloat16 amx": 60.0, "int8 amx": 120.0}
    assert ceilings.best_rate(rates, "bfloat16") == 60
    assert ceilings.best_rate(rates, "int8") == 120
    assert ceilings.best_rate(rates, "float32") == 10, "six products of bfloat16 make up one of floats"


def test_least_seconds() -> None:
    counted = operations(CELL)
    foreign = counted.layer_one * 3 // 4
    rates = {"float32 avx2": 1e3, "int8 vnni": 4e3, "read": 1e12}
    forward = (counted.forward - foreign) / 1e3 + foreign / 4e3
    assert ceilings.least_seconds(CELL, "forward", "float32", "int8", 4, rates) == pytest.approx(forward)
    step = forward + counted.backward / 1e3
    assert ceilings.least_seconds(CELL, "step", "float32", "int8", 4, rates) == pytest.approx(step)
    plain = ceilings.least_seconds(CELL, "forward", "float32", None, 4, rates)
    assert plain == pytest.approx(counted.forward / 1e3)
    # Where the weights cannot be read as fast as they could be multiplied.
    read = ceilings.bytes_read(CELL, "float32", 2)
    slow = ceilings.least_seconds(CELL, "forward", "float32", None, 2, rates | {"read": 1.0})
    assert slow == pytest.approx(read)


@needs_x86
def test_rates_of_this_machine() -> None:
    rates = ceilings.measure(2, 2**16, seconds=1e-3)
    assert {"float32 baseline", "read"} <= rates.keys()
    assert all(1e6 < rate < 1e15 for rate in rates.values()), rates


@needs_x86
def test_every_sum_is_computed_and_stays_in_its_register() -> None:
    """Sums that begin alike would be computed once, and a rate be a multiple of what the processor can do."""
    loops = {
        "float32_baseline": ("addps", 12),
        "float32_avx2": ("vfmadd...ps", 12),
        "float32_avx512": ("vfmadd...ps", 12),
        "int8_avx2": ("vpmaddwd", 4),
        "int8_avx512": ("vpmaddwd", 4),
        "int8_avx2_vnni": ("{vex} vpdpbusd", 12),
        "int8_avx512_vnni": ("vpdpbusd", 12),
        "bfloat16_avx512": ("vdpbf16ps", 12),
        "bfloat16_amx": ("tdpbf16ps", 4),
        "int8_amx": ("tdpbssd", 4),
    }
    assembly = ceilings.compiled("-S", "-o", "-")
    for name, (instruction, count) in loops.items():
        body = re.search(rf"^\S*{len(name)}{name}El:$(.*?)\.cfi_endproc", assembly, re.MULTILINE | re.DOTALL)
        assert body is not None, name
        found = re.findall(rf"^\s+{instruction}\s(.*)$", body[1], re.MULTILINE)
        assert len(found) == count, (name, found)
        assert not any("(" in operands for operands in found), (name, "an operand is in memory")


def test_what_does_not_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(click.ClickException, match=r"ceilings\.cpp cannot be compiled: .*no-such-compiler"):
        ceilings.compiled("-S")
    monkeypatch.delenv("CXX")
    with pytest.raises(click.ClickException, match=r"ceilings\.cpp cannot be compiled: "):
        ceilings.compiled("--no-such-option")
