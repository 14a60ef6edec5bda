"""Times layers, and the models made of them, against plain PyTorch, and writes results/models.json.

    python benchmarks/models.py              # and the table of docs/layers.md
    python benchmarks/models.py --again      # only what is missing in the results or was disturbed
    python benchmarks/models.py --layer MMoE # only this one; the others stay as they are in the results
    python benchmarks/models.py --render     # the table again, from the results

Every layer computes the same function in plain PyTorch in the ways one would write it (model_kinds.py): towers, gates
and experts of the scenarios one by one on their rows ("grouped", eager and compiled), all of them on all rows as
batched products and then picked ("all_towers", what public code does). Protocol and gate are those of
docs/benchmarks.md: correct to 1e−5 of float64 in outputs and gradients before anything is timed, then interleaved
rounds, medians, ratio to the best peer. Beside the ratio to all_towers stands that of the operations, which bounds what
leaving out foreign work can bring.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import page as pages
import records
from model_kinds import KINDS, Cell, EveryTower, Grouped, Kind, Margins, Tensors
from records import PRODUCT, PUBLIC, QUIET_SHARE, Record
from saml_kernels.layers import STARMLP
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import FLOAT32_BOUND, KINK_MARGIN, relative_error
from saml_kernels.testing.problem import PASSES
from saml_kernels.testing.timing import Protocol
from trunk import compiled_code_only

RESULTS: Final = records.RESULTS / "models.json"
PAGE: Final = pages.DOCS / "layers.md"
OURS: Final = "cpp"
SHAPES: Final = ((256, (512, 256, 128)), (128, (128, 64, 32)))
"""Width of x and of the hidden layers; a layer of width 1 follows. The paper's, and narrow ones."""

Function = Callable[[], Tensor]


def near_kink(exact: nn.Module, kind: Kind, inputs: Tensors, scenario: Tensor, num_scenarios: int) -> Tensor:
    """(B,) rows whose gradient rounding would decide, for a float64 layer."""
    way = Margins(scenario, num_scenarios)
    kind.plain(exact, inputs, way)
    return way.smallest < KINK_MARGIN


def multiply_adds(kind: Kind, layer: nn.Module, inputs: Tensors, ways: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Operations of forward and step, a multiplication and an addition counting two: needed ones, and the public way's.

    Counted while plain PyTorch runs. What is needed is the forward of :class:`Grouped` without a graph, as with one it
    computes some scores twice, and its backward.
    """
    counts = {}
    for name, way in ways.items():
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            kind.plain(layer, inputs, way)
        out = kind.plain(layer, inputs, way)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out.sum(), [*inputs, *layer.parameters()])
        first, second = forward.get_total_flops(), backward.get_total_flops()
        counts[name] = dict(zip(PASSES, (first, first + second), strict=True))
    return counts


def measure(cell: Cell, protocol: Protocol, wait: float) -> Record:
    """Errors and times of all contenders for one layer."""
    kind = KINDS[cell.layer]
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, exact = kind.make(cell, OURS), kind.make(cell, "reference").double()
    if isinstance(layer, STARMLP):
        # Scenarios start alike, at W_t = 1, where a contender that mixed them up would pass the gate.
        with torch.no_grad():
            for weight, bias in zip(layer.weights, layer.biases, strict=True):
                weight.add_(0.3 * torch.randn_like(weight))
                bias.add_(0.03 * torch.randn_like(bias))
    exact.load_state_dict(layer.state_dict())
    inputs = [torch.randn(cell.B, width) for width in (cell.in_dim, *kind.more_inputs)]
    scenario = torch.randint(cell.M, (cell.B,))
    wide = [x.double().requires_grad_() for x in inputs]
    out = exact(*wide, scenario)
    near = near_kink(exact, kind, wide, scenario, cell.M)
    cotangent = torch.randn(out.shape).masked_fill(near.view(-1, *[1] * (out.dim() - 1)), 0.0)
    reference = [out, out, *torch.autograd.grad(out, [*wide, *exact.parameters()], cotangent.double())]
    leaves = [*(x.requires_grad_() for x in inputs), *layer.parameters()]
    functions: dict[str, Function] = {
        "grouped": lambda: kind.plain(layer, inputs, Grouped(scenario, cell.M)),
        PUBLIC: lambda: kind.plain(layer, inputs, EveryTower(scenario, cell.M)),
        OURS: lambda: layer(*inputs, scenario),
    }
    functions["grouped, compiled"] = torch.compile(functions["grouped"], dynamic=False)

    def forward(function: Function) -> Tensor:
        with torch.inference_mode():
            return function()

    def step(function: Function) -> tuple[Tensor, ...]:
        trained = function()
        return trained, *torch.autograd.grad(trained, leaves, cotangent)

    errors = {
        name: max(map(relative_error, (forward(function), *step(function)), reference))
        for name, function in functions.items()
    }
    peers = [name for name in admitted(cell, errors) if name != OURS]
    ways = {"grouped": Grouped(scenario, cell.M), PUBLIC: EveryTower(scenario, cell.M)}
    counts = multiply_adds(kind, layer, inputs, ways)
    a, b = torch.randn(cell.B, cell.in_dim), torch.randn(cell.in_dim, kind.first_columns(cell))
    rows: list[records.Row] = []
    shares: dict[str, float | None] = {}
    for name, run in zip(PASSES, (forward, step), strict=True):
        calls: dict[str, Callable[[], object]] = {key: partial(run, functions[key]) for key in (*peers, OURS)}
        calls[PRODUCT] = partial(torch.mm, a, b)
        for call in calls.values():
            call()
        until_quiet(wait)
        with timing.Others() as others:
            seconds = timing.interleave(calls, protocol)
        rows += records.rows(name, seconds, dict.fromkeys((*peers, OURS), peers))
        shares[name] = others.share
        if (others.share or 0) > QUIET_SHARE:
            click.echo(f"  {name}: others had {others.share:.0%} of the processor time: run it with --again", err=True)
    return {
        "operations": {**counts["grouped"], PRODUCT: 2 * cell.B * cell.in_dim * b.shape[1]},
        "public operations": counts[PUBLIC],
        "contenders": [
            {"name": name, "peer": name != OURS, "dtype": "float32", "error": error} for name, error in errors.items()
        ],
        "others": shares,
        "rows": rows,
    }


def admitted(cell: Cell, errors: Mapping[str, float]) -> list[str]:
    """The contenders within the gate's bound. Raises ClickException without the layer, or without any peer of it."""
    passed = [name for name, error in errors.items() if error <= FLOAT32_BOUND]
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if OURS not in passed:
        raise click.ClickException(f"{cell}: the layer itself is outside the bound of {FLOAT32_BOUND}: {listed}")
    if len(passed) == 1:
        raise click.ClickException(f"{cell}: no plain formulation is within the bound of {FLOAT32_BOUND}: {listed}")
    return passed


def until_quiet(wait: float) -> None:
    """Returns when others have left the processor alone for two seconds, or after ``wait`` seconds."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        with timing.Others() as others:
            time.sleep(2)
        if (others.share or 0) <= QUIET_SHARE / 2:
            return


HEAD: Final = (
    "layer",
    "M",
    "pass",
    "best plain, ms",
    "fused, ms",
    "×",
    "all_towers ÷ fused",
    "in operations",
    "GFLOP/s",
    "of a product",
)


def table(record: Record) -> str:
    """Times of the layers and of their best peers, ratios and rates, in Markdown: a part for each shape."""
    parts: dict[str, list[Sequence[str]]] = {}
    for cell in records.cells(record):
        widths = (*cell.data["hidden_dims"], 1)
        title = f"B = {cell.B}, x of width {cell.data['in_dim']}, widths {widths}, float32"
        parts.setdefault(title, []).extend(_line(cell, name) for name in PASSES)
    machine = record["machine"]
    most = max((share or 0) for cell in record["cells"] for share in cell["others"].values())
    note = (
        f"{machine['processor']}, {machine['cpu capability']}, {record['threads']} threads, torch {machine['torch']}; "
        f"{record['started'][:10]}. Processor time of others: at most {most:.1%}."
    )
    tables = [f"{title}\n\n{pages.markdown(HEAD, lines)}" for title, lines in parts.items()]
    return "\n\n".join([*tables, note]) + "\n"


def _line(cell: records.Cell, name: str) -> Sequence[str]:
    """One layer and pass."""
    best, own = cell.best_peer("float32", name), cell.timed(OURS, name)
    if best is None or own is None or own.product is None:
        raise click.ClickException(f"{cell.name} lacks {name} of a layer, of a peer or of the product")
    operations, public = cell.data["operations"], cell.data.get("public operations")
    disturbed = (cell.data["others"][name] or 0) > QUIET_SHARE
    return (
        cell.data["layer"],
        str(cell.M),
        name + ("\\*" if disturbed else ""),
        f"{(cell.median(best, name) or 0) * 1e3:.1f} ({best})",
        f"{own.median * 1e3:.1f}",
        f"{own.ratio:.2f} ({own.ratio_p20:.2f}–{own.ratio_p80:.2f})",
        "–" if own.public is None else f"{own.public:.1f}",
        "–" if public is None else f"{public[name] / operations[name]:.1f}",
        f"{operations[name] / own.median / 1e9:.0f}",
        f"{own.product * operations[name] / operations[PRODUCT]:.0%}",
    )


def render(record: Record, page: str) -> str:
    """The page with the record's table in its place."""
    return pages.fill(page, {"models": table(record)})


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--budget", type=click.FloatRange(0, min_open=True), default=8.0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--again", is_flag=True, help="Only cells that --out lacks, or during which others took processor time")
@click.option("--layer", "layers", type=click.Choice(list(KINDS)), multiple=True, help="Only these")
@click.option("--wait", type=click.FloatRange(0), default=0.0, help="Seconds to wait for a quiet machine, each pass")
@click.option("--render", "only_render", is_flag=True, help="Only the table, from the results")
def main(
    rows: int, budget: float, out: Path, again: bool, layers: Sequence[str], wait: float, only_render: bool
) -> None:
    if not only_render:
        compiled_code_only()
        protocol = Protocol(budget=budget)
        record: Record = {**records.head(), "protocol": asdict(protocol), "cells": []}
        kept = records.quiet_cells(out, record) if again and out.exists() else []
        if layers and out.exists():
            kept += [cell for cell in records.earlier_cells(out, record) if cell["layer"] not in layers]
        present = {cell["layer"] for cell in kept}
        wanted = [
            Cell(layer, rows, m, *shape)
            for shape in SHAPES
            for layer, kind in KINDS.items()
            for m in kind.scenarios
            if not layers or layer in layers or layer in present
        ]
        records.measure_cells(out, record, wanted, kept, lambda cell: measure(cell, protocol, wait))
    record = json.loads(out.read_text(encoding="utf-8"))
    pages.publish(record, table, render, PAGE if out == RESULTS else None)


if __name__ == "__main__":
    main()
