"""Times STAR with W_t ∘ W_shared formed in the kernels and in PyTorch, and writes results/star_products.json.

    python benchmarks/star_products.py            # and the table of docs/cpu-kernels.md
    python benchmarks/star_products.py --render   # the table again, from the results

Both are the same layer on the C++ backend; its outputs and gradients agree before anything is timed. Beside them stands
a GroupedMLP of the same widths, which has no products: what is left between it and the kernels is what they cost.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import click
import torch
from torch import Tensor

import page as pages
import records
import saml_kernels
from records import Record
from saml_kernels.layers import STARMLP, GroupedMLP
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import FLOAT32_BOUND, relative_error
from saml_kernels.testing.problem import PASSES
from saml_kernels.testing.timing import Protocol

RESULTS: Final = records.RESULTS / "star_products.json"
PAGE: Final = pages.DOCS / "cpu-kernels.md"
KERNELS, PYTORCH, GROUPED = "kernels", "PyTorch", "without products"
SCENARIOS: Final = 8
WIDTHS: Final = (256, 512, 256, 128, 1)
ROWS: Final = (1, 64, 1024, 4096)


@dataclass(frozen=True)
class Cell:
    """A batch size."""

    B: int


def formed_in_pytorch(layer: STARMLP, x: Tensor, scenario: Tensor) -> Tensor:
    """The layer's output, of whole products."""
    weights = [own * shared for own, shared in zip(layer.weights, layer.shared_weights, strict=True)]
    biases = [own + shared for own, shared in zip(layer.biases, layer.shared_biases, strict=True)]
    return saml_kernels.grouped_mlp(x, scenario, weights, biases, activation=layer.activation, backend="cpp")


def measure(cell: Cell, protocol: Protocol) -> Record:
    """Times in both passes."""
    torch.manual_seed(0)
    star = STARMLP(SCENARIOS, WIDTHS[0], WIDTHS[1:], activation="gelu", backend="cpp")
    grouped = GroupedMLP(SCENARIOS, WIDTHS[0], WIDTHS[1:], activation="gelu", backend="cpp")
    with torch.no_grad():
        for weight in star.weights:
            weight.add_(0.3 * torch.randn_like(weight))
    x, scenario = torch.randn(cell.B, WIDTHS[0], requires_grad=True), torch.randint(SCENARIOS, (cell.B,))
    calls: dict[str, Callable[[], Tensor]] = {
        KERNELS: lambda: star(x, scenario),
        PYTORCH: lambda: formed_in_pytorch(star, x, scenario),
        GROUPED: lambda: grouped(x, scenario),
    }

    def forward(name: str) -> Tensor:
        with torch.inference_mode():
            return calls[name]()

    def step(name: str) -> tuple[Tensor, ...]:
        out = calls[name]()
        leaves = [x, *(grouped if name == GROUPED else star).parameters()]
        return out, *torch.autograd.grad(out.sum(), leaves)

    error = max(relative_error(found, expected) for found, expected in zip(step(KERNELS), step(PYTORCH), strict=True))
    if not error <= FLOAT32_BOUND:
        raise click.ClickException(f"{cell}: the two differ by {error:.1e}, more than {FLOAT32_BOUND}")
    lines: list[records.Row] = []
    shares: dict[str, float | None] = {}
    for measured, run in zip(PASSES, (forward, step), strict=True):
        with timing.Others() as others:
            seconds = timing.interleave({name: partial(run, name) for name in calls}, protocol)
        lines += records.rows(measured, seconds, {KERNELS: (PYTORCH,), GROUPED: (KERNELS,)})
        shares[measured] = others.share
    contenders = [{"name": name, "peer": name != KERNELS, "dtype": "float32"} for name in calls]
    return {"M": SCENARIOS, "error": error, "contenders": contenders, "others": shares, "rows": lines}


def table(record: Record) -> str:
    """Milliseconds and ratios, in Markdown."""
    lines = []
    for cell in records.cells(record):
        for measured in PASSES:
            found = {name: cell.timed(name, measured) for name in (KERNELS, PYTORCH, GROUPED)}
            kernels = found[KERNELS]
            if kernels is None or kernels.ratio is None:
                raise click.ClickException(f"{cell.name} lacks {measured}")
            times = [pages.digits(row.median * 1e3) for row in found.values() if row is not None]
            spread = f"{kernels.ratio:.2f} ({kernels.ratio_p20:.2f}–{kernels.ratio_p80:.2f})"
            lines.append((str(cell.B), measured, *times, spread))
    head = ("B", "pass", "products in the kernels, ms", "in PyTorch, ms", "GroupedMLP, ms", "×")
    machine = record["machine"]
    most = max((share or 0) for cell in record["cells"] for share in cell["others"].values())
    note = (
        f"`{record['command']}`, {record['started'][:10]}: {machine['processor']}, {machine['cpu capability']}, "
        f"{record['threads']} threads, torch {machine['torch']}. Processor time of others: at most {most:.1%}."
    )
    return f"{pages.markdown(head, lines)}\n\n{note}\n"


def render(record: Record, page: str) -> str:
    """The page with the record's table in its place."""
    return pages.fill(page, {"star products": table(record)})


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(1), multiple=True, default=ROWS, show_default=True)
@click.option("--budget", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--render", "only_render", is_flag=True, help="Only the table, from the results")
def main(rows: tuple[int, ...], budget: float, out: Path, only_render: bool) -> None:
    if not only_render:
        protocol = Protocol(budget=budget)
        record: Record = {**records.head(), "protocol": asdict(protocol), "cells": []}
        records.measure_cells(out, record, [Cell(count) for count in rows], [], lambda cell: measure(cell, protocol))
    record = json.loads(out.read_text(encoding="utf-8"))
    pages.publish(record, table, render, PAGE if out == RESULTS else None)


if __name__ == "__main__":
    main()
