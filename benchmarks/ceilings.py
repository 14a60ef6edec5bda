"""What this processor can do at most, and the least time that a cell therefore takes.

benchmarks/ceilings.cpp, compiled when it is first asked, has a loop for every instruction that multiplies, limited by
nothing but it, and one that reads memory. A pass cannot be faster than its operations at those rates, nor than the
weights it reads; it may well be slower: sums have to be stored, and operands to come from caches.
"""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import click

import workload
from workload import Cell

SOURCE: Final = Path(__file__).with_suffix(".cpp")
SECONDS: Final = 0.1
"""Of one loop."""
ROUNDS: Final = 5
"""The fastest one counts: a ceiling is what the processor can do when nothing disturbs it."""
PRODUCTS_PER_FLOAT: Final = 6
"""Products of bfloat16 that make up one of float32 to 24 bits."""
Rates = dict[str, float]
"""Operations a second by "type instructions", such as "float32 avx2"; bytes a second as "read"."""


@functools.cache
def loops() -> ctypes.CDLL:
    """The compiled loops.

    Raises:
        click.ClickException: no compiler, or not an x86-64 processor.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise click.ClickException(f"the loops of {SOURCE.name} are for x86-64, this is {platform.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        compiled("-shared", "-o", str(library))
        found = ctypes.CDLL(str(library))
    found.name_of.restype = ctypes.c_char_p
    found.is_supported.restype = ctypes.c_bool
    found.operations_a_second.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    found.operations_a_second.restype = ctypes.c_double
    found.bytes_a_second.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    found.bytes_a_second.restype = ctypes.c_double
    return found


def compiled(*options: str) -> str:
    """What the compiler prints with these options; click.ClickException where it does not do what it is asked."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-fPIC", "-pthread", str(SOURCE), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise click.ClickException(f"{SOURCE.name} cannot be compiled: {error}") from None
    if done.returncode:
        raise click.ClickException(f"{SOURCE.name} cannot be compiled: {done.stderr.strip()}")
    return done.stdout


def measure(threads: int, bytes_read: int, seconds: float = SECONDS) -> Rates:
    """All rates of so many threads together; "read" is of so many bytes, in order, again and again."""
    library = loops()
    supported = [index for index in range(library.rates()) if library.is_supported(index)]
    rates = {
        library.name_of(index).decode(): max(
            library.operations_a_second(index, threads, seconds) for _ in range(ROUNDS)
        )
        for index in supported
    }
    return rates | {"read": max(library.bytes_a_second(bytes_read, threads, seconds) for _ in range(ROUNDS))}


def best_rate(rates: Rates, dtype: str) -> float:
    """Operations a second with factors of ``dtype``, by whatever instructions give most of them.

    Numbers in fewer bits can be multiplied as floats, and floats as three bfloat16 each.
    """
    best = {
        kind: max((rate for name, rate in rates.items() if name.split()[0] == kind), default=0.0)
        for kind in ("float32", "bfloat16", "int8")
    }
    floats = max(best["float32"], best["bfloat16"] / PRODUCTS_PER_FLOAT)
    return max(floats, best.get(dtype, 0.0))


def least_seconds(
    cell: Cell, measured: str, dtype: str, foreign: str | None, own_scenarios: int, rates: Rates
) -> float:
    """Of a pass, at the rates.

    Args:
        cell: its shapes.
        measured: "forward" or "step".
        dtype: of inputs and parameters.
        foreign: what foreign branches multiply; None: ``dtype``.
        own_scenarios: that have rows.
        rates: of this processor.
    """
    operations = workload.operations(cell)
    own, others = best_rate(rates, dtype), best_rate(rates, foreign or dtype)
    foreign_operations = operations.layer_one * (cell.M - 1) // cell.M
    computing = (operations.forward - foreign_operations) / own + foreign_operations / others
    reading = bytes_read(cell, dtype, own_scenarios) / rates["read"]
    forward = max(computing, reading)
    return forward if measured == "forward" else forward + operations.backward / own


def bytes_read(cell: Cell, dtype: str, own_scenarios: int) -> int:
    """Of weights, in a forward pass."""
    return workload.numbers_read(cell, own_scenarios) * (4 if dtype == "float32" else 2)
