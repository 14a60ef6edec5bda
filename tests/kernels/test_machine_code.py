"""What the compiler made of the products' innermost loops, for instruction sets that this machine may lack, too."""

import collections
import platform
import re
import shutil
import subprocess
from typing import NamedTuple

import pytest
import torch

from saml_kernels import extension

INFO = extension.build_info()
pytestmark = [
    pytest.mark.skipif(INFO is None, reason="there is no extension"),
    pytest.mark.skipif("clang" in str(INFO).lower(), reason="the loops are known as GCC unrolls them"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86-64's"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump"),
]
# By instruction and register: rows by vectors of the register tile, by the terms that are unrolled.
MULTIPLICATIONS = {
    ("vfmadd", "ymm"): 6 * 2 * 4,
    ("vfmadd", "zmm"): 12 * 2 * 4,
    ("vdpbf16ps", "zmm"): 12 * 2 * 4,
    ("vpmaddwd", "ymm"): 6 * 2,
    ("vpmaddwd", "zmm"): 12 * 2,
    ("vpdpbusd", "ymm"): 6 * 2 * 4,
    ("vpdpbusd", "zmm"): 12 * 2 * 4,
}
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(?:\{vex\} )?(\w+)\s*(.*)$", re.MULTILINE)
JUMP = re.compile(r"j(?!mp)\w+")


class Counts(NamedTuple):
    """Of one innermost loop."""

    on_stack: int
    """Vectors stored to the stack or loaded from it."""
    copies: int
    """Vectors copied from register to register."""


@pytest.fixture(scope="module")
def loops() -> dict[tuple[str, str], dict[int, list[Counts]]]:
    """By instruction and register, then by how many of the instruction a loop has: the loops."""
    library = extension.library_path(torch.__version__)
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = [(int(address, 16), name, operands) for address, name, operands in INSTRUCTION.findall(text)]
    place = {address: index for index, (address, _, _) in enumerate(code)}
    jumps = [index for index, (_, name, _) in enumerate(code) if JUMP.fullmatch(name)]
    found: dict[tuple[str, str], dict[int, list[Counts]]] = {
        key: collections.defaultdict(list) for key in MULTIPLICATIONS
    }
    for before, end in zip([-1, *jumps], jumps, strict=False):
        begin = place.get(int(code[end][2].split()[0], 16), len(code))
        if not before < begin < end:
            continue
        body = [(name, operands) for _, name, operands in code[begin:end]]
        moves = [operands for name, operands in body if re.match("v?mov", name)]
        counts = Counts(
            on_stack=sum(bool(re.search(r"mm\d+,.*\(%r[sb]p|\(%r[sb]p.*\),%[xyz]mm", each)) for each in moves),
            copies=sum(bool(re.fullmatch(r"%[xyz]mm\d+,%[xyz]mm\d+", each)) for each in moves),
        )
        for (instruction, register), by_number in found.items():
            number = sum(name.startswith(instruction) and register in operands for name, operands in body)
            by_number[number].append(counts)
    return found


@pytest.mark.parametrize("key", MULTIPLICATIONS, ids=" ".join)
def test_sums_stay_in_registers(key, loops):
    """Sums that go through memory, or from register to register, cost more than what is added to them."""
    number = MULTIPLICATIONS[key]
    full = loops[key][number]
    assert full, f"no loop has {number} of {key[0]}: the register tile's is not found"
    most = number // 8
    assert all(counts.on_stack <= most and counts.copies <= most for counts in full), full
