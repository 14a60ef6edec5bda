"""Times the layers of STAR, HMoE and the shared bottom's towers against plain PyTorch, and writes results/models.json.

    python benchmarks/models.py              # and the table of docs/layers.md
    python benchmarks/models.py --again      # only what is missing in the results or was disturbed
    python benchmarks/models.py --render     # the table again, from the results

Every layer computes the same function in plain PyTorch in the ways one would write it: towers one by one on their
scenario's rows ("grouped", eager and compiled), all towers on all rows as batched products and then picked
("all_towers", what public code does). Protocol and gate are those of docs/benchmarks.md: correct to 1e−5 of float64 in
outputs and gradients before anything is timed, then interleaved rounds, medians, ratio to the best peer.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor, nn

import page as pages
import records
from records import PRODUCT, PUBLIC, QUIET_SHARE, Record
from saml_kernels.layers import STARMLP, GroupedMLP, ScoreMixture
from saml_kernels.testing import timing
from saml_kernels.testing.accuracy import FLOAT32_BOUND, KINK_MARGIN, relative_error, tower_kink_margin
from saml_kernels.testing.problem import PASSES
from saml_kernels.testing.timing import Protocol
from trunk import compiled_code_only

RESULTS: Final = records.RESULTS / "models.json"
PAGE: Final = pages.DOCS / "layers.md"
OURS: Final = "cpp"
SCENARIOS: Final = (8, 32)
SHAPES: Final = ((256, (512, 256, 128)), (128, (128, 64, 32)))
"""Width of x and of the hidden layers; a layer of width 1 follows. The paper's, and narrow ones."""

Parameters = tuple[list[Tensor], list[Tensor]]
Towers = Callable[[Tensor, Tensor, Parameters], Tensor]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One layer's shapes."""

    layer: str
    B: int
    M: int
    in_dim: int
    hidden_dims: tuple[int, ...]

    @property
    def tower(self) -> int:
        """Operations of one tower on all rows, a multiplication and an addition counting two."""
        return 2 * self.B * sum(before * after for before, after in pairwise((self.in_dim, *self.hidden_dims, 1)))


@dataclass(frozen=True)
class Kind:
    """A layer, how plain PyTorch gets from its parameters to its output, and what that costs."""

    make: Callable[[Cell, str], nn.Module]
    plain: Callable[[Any, Tensor, Tensor, Towers], Tensor]
    """With one way to run towers."""
    parameters: Callable[[Any], Parameters]
    """Weights and biases of all towers."""
    forward_towers: Callable[[int], int]
    """How many towers a row runs through, of M."""


def grouped(x: Tensor, scenario: Tensor, parameters: Parameters) -> Tensor:
    """Rows sorted by scenario, each scenario's rows through its tower: (B, d_L)."""
    t, permutation = torch.sort(scenario, stable=True)
    sizes = torch.bincount(t, minlength=len(parameters[0][0])).tolist()
    parts = list(x[permutation].split(sizes))
    last = len(parameters[0]) - 1
    for index, (weight, bias) in enumerate(zip(*parameters, strict=True)):
        parts = [torch.addmm(b, part, w) for part, w, b in zip(parts, weight.unbind(0), bias.unbind(0), strict=True)]
        parts = parts if index == last else [part.relu() for part in parts]
    return torch.cat(parts)[torch.argsort(permutation)]


def every_tower(x: Tensor, parameters: Parameters) -> Tensor:
    """All towers on all rows as batched products: (B, M, d_L)."""
    streams = x.expand(len(parameters[0][0]), -1, -1)
    last = len(parameters[0]) - 1
    for index, (weight, bias) in enumerate(zip(*parameters, strict=True)):
        streams = torch.baddbmm(bias.unsqueeze(1), streams, weight)
        streams = streams if index == last else streams.relu()
    return streams.transpose(0, 1)


def all_towers(x: Tensor, scenario: Tensor, parameters: Parameters) -> Tensor:
    """All towers on all rows, the own one picked: (B, d_L)."""
    return every_tower(x, parameters)[torch.arange(len(x)), scenario]


def _own(layer: Any) -> Parameters:
    return list(layer.weights), list(layer.biases)


def _star(layer: Any) -> Parameters:
    weights = [own * shared for own, shared in zip(layer.weights, layer.shared_weights, strict=True)]
    biases = [own + shared for own, shared in zip(layer.biases, layer.shared_biases, strict=True)]
    return weights, biases


def _mixture(layer: Any, x: Tensor, scenario: Tensor, towers: Towers) -> Tensor:
    """In training foreign scores without a graph and the own one by ``towers``; otherwise every tower once.

    The logit is 2 artanh Σ W_j tanh(s_j / 2): torch.logit of a mixture near 1/2 misses the gate (1.7e−5 at M = 32).
    """
    parameters = _own(layer.networks)
    with torch.no_grad():
        logits = every_tower(x, parameters).squeeze(2)
    if torch.is_grad_enabled():
        logits = logits.scatter(1, scenario.unsqueeze(1), towers(x, scenario, parameters))
    return 2 * torch.atanh((torch.softmax(layer.gate(x), 1) * torch.tanh(logits / 2)).sum(1))


def _mlp(layer: Any) -> Callable[[Cell, str], nn.Module]:
    """A layer of towers that end in a logit."""

    def make(cell: Cell, backend: str) -> nn.Module:
        module: nn.Module = layer(
            cell.M, cell.in_dim, (*cell.hidden_dims, 1), output_activation="identity", backend=backend
        )
        return module

    return make


KINDS: Final = {
    "towers (GroupedMLP)": Kind(
        _mlp(GroupedMLP), lambda layer, x, scenario, towers: towers(x, scenario, _own(layer)), _own, lambda _: 1
    ),
    "STAR (STARMLP)": Kind(
        _mlp(STARMLP), lambda layer, x, scenario, towers: towers(x, scenario, _star(layer)), _star, lambda _: 1
    ),
    "HMoE (ScoreMixture)": Kind(
        lambda cell, backend: ScoreMixture(cell.M, cell.in_dim, cell.hidden_dims, backend=backend),
        _mixture,
        lambda layer: _own(layer.networks),
        lambda M: M,
    ),
}


def near_kink(exact: nn.Module, kind: Kind, x: Tensor, scenario: Tensor) -> Tensor:
    """(B,) rows whose gradient rounding would decide, for a float64 layer."""
    weights, biases = kind.parameters(exact)
    return tower_kink_margin(x, scenario, weights[:-1], biases[:-1]) < KINK_MARGIN


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
    x, scenario = torch.randn(cell.B, cell.in_dim), torch.randint(cell.M, (cell.B,))
    wide = x.double().requires_grad_()
    out = exact(wide, scenario)
    near = near_kink(exact, kind, x, scenario)
    cotangent = torch.randn(out.shape).masked_fill(near.view(-1, *[1] * (out.dim() - 1)), 0.0)
    reference = [out, out, *torch.autograd.grad(out, [wide, *exact.parameters()], cotangent.double())]
    x.requires_grad_()
    leaves = [x, *layer.parameters()]
    functions: dict[str, Function] = {
        "grouped": lambda x: kind.plain(layer, x, scenario, grouped),
        PUBLIC: lambda x: kind.plain(layer, x, scenario, all_towers),
        OURS: lambda x: layer(x, scenario),
    }
    functions["grouped, compiled"] = torch.compile(functions["grouped"], dynamic=False)

    def forward(function: Function) -> Tensor:
        with torch.inference_mode():
            return function(x)

    def step(function: Function) -> tuple[Tensor, ...]:
        trained = function(x)
        return trained, *torch.autograd.grad(trained, leaves, cotangent)

    errors = {
        name: max(map(relative_error, (forward(function), *step(function)), reference))
        for name, function in functions.items()
    }
    peers = [name for name in admitted(cell, errors) if name != OURS]
    towers = kind.forward_towers(cell.M)
    a, b = torch.randn(cell.B, cell.in_dim), torch.randn(cell.in_dim, towers * cell.hidden_dims[0])
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
        "operations": {
            "forward": towers * cell.tower,
            "step": (towers + 2) * cell.tower,
            PRODUCT: 2 * cell.B * cell.in_dim * b.shape[1],
        },
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
    operations = cell.data["operations"]
    disturbed = (cell.data["others"][name] or 0) > QUIET_SHARE
    return (
        cell.data["layer"],
        str(cell.M),
        name + ("\\*" if disturbed else ""),
        f"{(cell.median(best, name) or 0) * 1e3:.1f} ({best})",
        f"{own.median * 1e3:.1f}",
        f"{own.ratio:.2f} ({own.ratio_p20:.2f}–{own.ratio_p80:.2f})",
        "–" if own.public is None else f"{own.public:.1f}",
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
@click.option("--wait", type=click.FloatRange(0), default=0.0, help="Seconds to wait for a quiet machine, each pass")
@click.option("--render", "only_render", is_flag=True, help="Only the table, from the results")
def main(rows: int, budget: float, out: Path, again: bool, wait: float, only_render: bool) -> None:
    if not only_render:
        compiled_code_only()
        protocol = Protocol(budget=budget)
        record: Record = {**records.head(), "protocol": asdict(protocol), "cells": []}
        kept = records.quiet_cells(out, record) if again and out.exists() else []
        wanted = [Cell(layer, rows, m, *shape) for shape in SHAPES for layer in KINDS for m in SCENARIOS]
        records.measure_cells(out, record, wanted, kept, lambda cell: measure(cell, protocol, wait))
    record = json.loads(out.read_text(encoding="utf-8"))
    click.echo(table(record))
    if out == RESULTS:
        PAGE.write_text(render(record, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
