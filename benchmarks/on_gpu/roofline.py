"""What the trunk must compute and move, and how fast this device does either at best.

A pass cannot be faster than its operations at the rate of a large product, nor than its bytes at the rate of a large
copy; the larger of the two times is its roof. Fraction of the roofline = roof / measured time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import workload
from on_gpu.target import Target
from saml_kernels.testing import timing
from workload import Cell

Rates = dict[str, float | None]
ROUNDS = 11


@dataclass(frozen=True)
class Bytes:
    """Bytes that have to move for one batch; every tensor once in each pass that needs it."""

    forward: int
    """Inference: inputs and parameters read, own and aux written."""
    training_forward: int
    """Besides, what backward needs is written: own streams, and the streams of all branches."""
    backward: int
    """Both read again, with inputs, parameters and cotangents; every gradient written."""
    foreign_streams: int
    """Of a backward's, its one read of the foreign streams: what grows with M."""


def bytes_moved(cell: Cell, itemsize: int) -> Bytes:
    """From the formulas: one mutual unit after layer 1, auxiliary widths as the branches'; ids are 8 bytes.

    inputs       B (D_l + D_g)
    parameters   Σ_l M (d_{l−1} + a_l + 1) d_l + (a_{l−1} + 1) a_l,  and M (d_1 + 1) d_1 for the gate
    outputs      B (d_L + a_L), as their cotangents
    own streams  B (Σ_l (d_l + a_l) + 2 d_1)            V_t and A of every layer, gate and M_t
    streams      B M d_1
    """
    B, M, d = cell.B, cell.M, cell.hidden_dims[0]
    inputs = B * (cell.local_dim + cell.global_dim)
    parameters = workload.numbers_read(cell, M)
    outputs = 2 * B * cell.hidden_dims[-1]
    own = B * (2 * sum(cell.hidden_dims) + 2 * d)
    streams = B * M * d
    forward = inputs + parameters + outputs
    backward = inputs + parameters + outputs + own + streams + inputs + parameters
    ids = 8 * B
    return Bytes(
        forward * itemsize + ids,
        (forward + own + streams) * itemsize + ids,
        backward * itemsize + ids,
        B * (M - 1) * d * itemsize,
    )


def roof_seconds(cell: Cell, kind: str, rate: str, itemsize: int, foreign: str | None, rates: Rates) -> float | None:
    """The least time of pass ``kind`` at the measured ceilings; None where one was not measured.

    ``rate`` names the ceiling of own products, ``foreign`` that of foreign ones where it is another.
    """
    own_rate, foreign_rate, copy = rates.get(rate), rates.get(foreign or rate), rates.get("copy")
    if not own_rate or not foreign_rate or not copy:
        return None
    operations, moved = workload.operations(cell), bytes_moved(cell, itemsize)
    foreign_operations = operations.layer_one * (cell.M - 1) // cell.M
    computing = (operations.forward - foreign_operations) / own_rate + foreign_operations / foreign_rate
    if kind == "forward":
        return max(computing, moved.forward / copy)
    return max(computing, moved.training_forward / copy) + max(operations.backward / own_rate, moved.backward / copy)


def ceilings(target: Target) -> dict[str, Any]:
    """Operations a second of large products by type, bytes a second of a large copy (read and written both counted)."""
    n, copied = (256, 2**20) if target.dry_run else (8192, 2**30)
    rates: Rates = {}
    reasons: dict[str, str] = {}
    source = torch.empty(copied, dtype=torch.uint8, device=target.device).random_()
    destination = torch.empty_like(source)
    wanted: dict[str, tuple[Callable[[], Any], float]] = {
        "copy": (lambda: destination.copy_(source), 2.0 * copied),
        "bfloat16": (_product(target, n, torch.bfloat16), 2.0 * n**3),
        "float32": (_product(target, n // 2, torch.float32, tf32=False), 2.0 * (n // 2) ** 3),
        "tf32": (_product(target, n // 2, torch.float32, tf32=True), 2.0 * (n // 2) ** 3),
        "int8": (_product(target, n, torch.int8), 2.0 * n**3),
        "float8_e4m3fn": (_product(target, n, torch.float8_e4m3fn), 2.0 * n**3),
    }
    for name, (call, work) in wanted.items():
        try:
            for _ in range(3):
                call()
            rates[name] = work / timing.summary([target.clock(call, 2) for _ in range(ROUNDS)]).median
        except (RuntimeError, AttributeError, ValueError, NotImplementedError) as error:
            rates[name] = None
            reasons[name] = str(error).splitlines()[0]
    return {"rates": rates, "reasons": reasons, "product": n, "copied_bytes": copied}


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """float32 products with or without tf32 within the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _product(target: Target, n: int, dtype: torch.dtype, *, tf32: bool = False) -> Callable[[], Any]:
    """One n × n by n × n product of random numbers."""
    a, b = (torch.randn(n, n, device=target.device) for _ in range(2))
    if dtype == torch.int8:
        x, y = ((entry * 40).clamp(-127, 127).to(dtype) for entry in (a, b))
        return lambda: torch._int_mm(x, y.t())
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=target.device)
        x, y = a.to(dtype), b.to(dtype)
        return lambda: torch._scaled_mm(x, y.t(), one, one, out_dtype=torch.bfloat16)
    x, y = a.to(dtype), b.to(dtype)

    def call() -> Any:
        with tf32_allowed(tf32):
            return torch.mm(x, y)

    return call
