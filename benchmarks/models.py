"""Times the layers of STAR, HMoE and the shared bottom's towers against plain PyTorch, and writes results/models.json.

    python benchmarks/models.py              # and the table of docs/layers.md
    python benchmarks/models.py --again      # only what is missing in the results or was disturbed
    python benchmarks/models.py --render     # the table again, from the results

Every layer computes the same function in plain PyTorch in the ways one would write it: towers one by one on their
scenario's rows ("grouped", eager and compiled), all towers on all rows as batched products and then picked
("all_towers", what public code does). Protocol and gate are those of docs/benchmarks.md: correct to 1e−5 of float64 in
outputs and gradients before anything is timed, then interleaved rounds, medians, ratio to the best peer.
"""

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import click
import timing
import torch
from gate import FLOAT32_BOUND, relative_error
from timing import Protocol
from torch import Tensor, nn

import records
from saml_kernels import doctor
from saml_kernels.layers import STARMLP, GroupedMLP, ScoreMixture
from trunk import QUIET_SHARE
from workload import KINK_MARGIN

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "models.json"
PAGE: Final = HERE.parent / "docs" / "layers.md"
BETWEEN: Final = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- end -->)", re.DOTALL)
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
    own_parameters: Callable[[Any, int], Parameters]
    """The tower that serves a scenario."""
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


def _towers(layer: Any, x: Tensor, scenario: Tensor, towers: Towers) -> Tensor:
    return towers(x, scenario, (list(layer.weights), list(layer.biases)))


def _star(layer: Any, x: Tensor, scenario: Tensor, towers: Towers) -> Tensor:
    weights = [own * shared for own, shared in zip(layer.weights, layer.shared_weights, strict=True)]
    biases = [own + shared for own, shared in zip(layer.biases, layer.shared_biases, strict=True)]
    return towers(x, scenario, (weights, biases))


def _mixture(layer: Any, x: Tensor, scenario: Tensor, towers: Towers) -> Tensor:
    """In training foreign scores without a graph and the own one by ``towers``; otherwise every tower once.

    The logit is 2 artanh Σ W_j tanh(s_j / 2): torch.logit of a mixture near 1/2 misses the gate (1.7e−5 at M = 32).
    """
    parameters = list(layer.networks.weights), list(layer.networks.biases)
    with torch.no_grad():
        logits = every_tower(x, parameters).squeeze(2)
    if torch.is_grad_enabled():
        logits = logits.scatter(1, scenario.unsqueeze(1), towers(x, scenario, parameters))
    return 2 * torch.atanh((torch.softmax(layer.gate(x), 1) * torch.tanh(logits / 2)).sum(1))


def _own_tower(layer: Any, k: int) -> Parameters:
    return [weight[k] for weight in layer.weights], [bias[k] for bias in layer.biases]


def _own_star(layer: Any, k: int) -> Parameters:
    weights, biases = _own_tower(layer, k)
    return (
        [own * shared for own, shared in zip(weights, layer.shared_weights, strict=True)],
        [own + shared for own, shared in zip(biases, layer.shared_biases, strict=True)],
    )


KINDS: Final = {
    "towers (GroupedMLP)": Kind(
        lambda cell, backend: GroupedMLP(
            cell.M, cell.in_dim, (*cell.hidden_dims, 1), output_activation="identity", backend=backend
        ),
        _towers,
        _own_tower,
        lambda _: 1,
    ),
    "STAR (STARMLP)": Kind(
        lambda cell, backend: STARMLP(
            cell.M, cell.in_dim, (*cell.hidden_dims, 1), output_activation="identity", backend=backend
        ),
        _star,
        _own_star,
        lambda _: 1,
    ),
    "HMoE (ScoreMixture)": Kind(
        lambda cell, backend: ScoreMixture(cell.M, cell.in_dim, cell.hidden_dims, backend=backend),
        _mixture,
        lambda layer, k: _own_tower(layer.networks, k),
        lambda M: M,
    ),
}


def relu_margin(layer: nn.Module, kind: Kind, x: Tensor, scenario: Tensor) -> Tensor:
    """(B,) the smallest |z| under a relu that a row's gradient passes, for a float64 layer: see workload.make."""
    margin = torch.full(scenario.shape, torch.inf, dtype=torch.float64)
    for k in range(int(scenario.max()) + 1):
        rows = (scenario == k).nonzero().squeeze(1)
        stream = x[rows]
        for weight, bias in list(zip(*kind.own_parameters(layer, k), strict=True))[:-1]:
            stream = stream @ weight + bias
            margin[rows] = margin[rows].minimum(stream.abs().amin(1))
            stream = stream.relu()
    return margin


def make_batch(layer: nn.Module, kind: Kind, cell: Cell) -> tuple[Tensor, Tensor]:
    """x (B, in_dim) float32 and scenario (B,); rows whose gradient rounding would decide are copies of others."""
    x, scenario = torch.randn(cell.B, cell.in_dim), torch.randint(cell.M, (cell.B,))
    with torch.no_grad():
        near_kink = relu_margin(layer, kind, x.double(), scenario) < KINK_MARGIN
    index = torch.arange(cell.B)
    safe = index[~near_kink]
    if len(safe) == 0:
        raise click.ClickException(f"{cell}: every row has a ReLU input within {KINK_MARGIN} of 0")
    index[near_kink] = safe[torch.arange(cell.B - len(safe)) % len(safe)]
    return x[index], scenario[index]


def measure(cell: Cell, protocol: Protocol, wait: float) -> dict[str, Any]:
    """Errors and seconds of all contenders for one layer."""
    kind = KINDS[cell.layer]
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, exact = kind.make(cell, "cpp"), kind.make(cell, "reference").double()
    if isinstance(layer, STARMLP):
        # Scenarios start alike, at W_t = 1, where a contender that mixed them up would pass the gate.
        with torch.no_grad():
            for weight, bias in zip(layer.weights, layer.biases, strict=True):
                weight.add_(0.3 * torch.randn_like(weight))
                bias.add_(0.03 * torch.randn_like(bias))
    exact.load_state_dict(layer.state_dict())
    x, scenario = make_batch(exact, kind, cell)
    x.requires_grad_()
    functions: dict[str, Function] = {
        "grouped": lambda x: kind.plain(layer, x, scenario, grouped),
        "all_towers": lambda x: kind.plain(layer, x, scenario, all_towers),
        "cpp": lambda x: layer(x, scenario),
    }
    functions["grouped, compiled"] = torch.compile(functions["grouped"], dynamic=False)
    leaves = [x, *layer.parameters()]

    wide = x.detach().double().requires_grad_()
    out = exact(wide, scenario)
    cotangent = torch.randn(out.shape)
    reference = [out, out, *torch.autograd.grad(out, [wide, *exact.parameters()], cotangent.double())]

    def forward(function: Function) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                return function(x)

        return call

    def step(function: Function) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x), leaves, cotangent)

    errors: dict[str, float] = {}
    for name, function in functions.items():
        trained = function(x)
        results = [forward(function)(), trained, *torch.autograd.grad(trained, leaves, cotangent)]
        errors[name] = max(
            relative_error(result.detach(), expected.detach())
            for result, expected in zip(results, reference, strict=True)
        )
    passed = admitted(cell, functions, errors)

    towers = kind.forward_towers(cell.M)
    product = torch.randn(cell.B, cell.in_dim), torch.randn(cell.in_dim, towers * cell.hidden_dims[0])
    passes = {}
    for name, make in (("forward", forward), ("step", step)):
        calls: dict[str, Callable[[], object]] = {key: make(function) for key, function in passed.items()}
        calls["product"] = lambda: torch.mm(*product)
        for call in calls.values():
            call()
        until_quiet(wait)
        with timing.Others() as others:
            seconds = timing.interleave(calls, protocol)
        passes[name] = {"seconds": seconds, "others": others.share}
        if (others.share or 0) > QUIET_SHARE:
            click.echo(f"  {name}: others had {others.share:.0%} of the processor time: run it with --again", err=True)
    operations = {"forward": towers * cell.tower, "step": (towers + 2) * cell.tower}
    size = 2 * product[0].numel() * product[1].shape[1]
    return asdict(cell) | {"errors": errors, "operations": operations | {"product": size}, "passes": passes}


def admitted(cell: Cell, functions: Mapping[str, Function], errors: Mapping[str, float]) -> dict[str, Function]:
    """The contenders within the gate's bound. Raises ClickException without the layer, or without any peer of it."""
    passed = {name: function for name, function in functions.items() if errors[name] <= FLOAT32_BOUND}
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if "cpp" not in passed:
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


def table(record: dict[str, Any]) -> str:
    """Times of the layers and of their best peers, ratios and rates, in Markdown: a part for each shape."""
    lines: list[str] = []
    shape: tuple[Any, ...] = ()
    for cell in record["cells"]:
        if shape != (shape := (cell["B"], cell["in_dim"], *cell["hidden_dims"])):
            lines += [
                "",
                f"B = {cell['B']}, x of width {cell['in_dim']}, widths {(*cell['hidden_dims'], 1)}, float32",
                "",
                "| layer | M | pass | best plain, ms | fused, ms | × | all_towers ÷ fused | GFLOP/s | of a product |",
                "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            ]
        for name, timed in cell["passes"].items():
            seconds = timed["seconds"]
            peers = {peer: values for peer, values in seconds.items() if peer not in ("cpp", "product")}
            best = timing.fastest(peers)
            own, ratio = timing.summary(seconds["cpp"]), timing.ratio(seconds[best], seconds["cpp"])
            public = timing.ratio(seconds["all_towers"], seconds["cpp"]).median if "all_towers" in peers else None
            share = timing.ratio(seconds["product"], seconds["cpp"]).median
            share *= cell["operations"][name] / cell["operations"]["product"]
            mark = "\\*" if (timed["others"] or 0) > QUIET_SHARE else ""
            lines.append(
                f"| {cell['layer']} | {cell['M']} | {name}{mark} | "
                f"{timing.summary(seconds[best]).median * 1e3:.1f} ({best}) | {own.median * 1e3:.1f} | "
                f"{ratio.median:.2f} ({ratio.p20:.2f}–{ratio.p80:.2f}) | "
                f"{'–' if public is None else f'{public:.1f}'} | "
                f"{cell['operations'][name] / own.median / 1e9:.0f} | {share:.0%} |"
            )
    machine = record["machine"]
    most = max((timed["others"] or 0) for cell in record["cells"] for timed in cell["passes"].values())
    lines += [
        "",
        f"{machine['processor']}, {machine['cpu capability']}, {record['threads']} threads, torch {machine['torch']}; "
        f"{record['started'][:10]}. Processor time of others: at most {most:.1%}.",
    ]
    return "\n".join(lines).lstrip("\n") + "\n"


def render(record: dict[str, Any], page: str) -> str:
    """The page with the record's table in its place."""
    return BETWEEN.sub(lambda _: table(record), page)


def _undisturbed(path: Path, record: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Those of an earlier run on the same machine that need not be measured again."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for what in ("machine", "threads"):
        # As it would be read back: JSON has lists only.
        if earlier[what] != json.loads(json.dumps(record[what])):
            raise click.BadParameter(f"{what} of {path} differs: {earlier[what]}", param_hint="--again")
    return {
        Cell(cell["layer"], cell["B"], cell["M"], cell["in_dim"], tuple(cell["hidden_dims"])): cell
        for cell in earlier["cells"]
        if all((timed["others"] or 0) <= QUIET_SHARE for timed in cell["passes"].values())
    }


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--budget", type=click.FloatRange(0, min_open=True), default=8.0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--again", is_flag=True, help="Only cells that --out lacks, or during which others took processor time")
@click.option("--wait", type=click.FloatRange(0), default=0.0, help="Seconds to wait for a quiet machine, each pass")
@click.option("--render", "only_render", is_flag=True, help="Only the table, from the results")
def main(rows: int, budget: float, out: Path, again: bool, wait: float, only_render: bool) -> None:
    if not only_render:
        # Compiled code must be the code that is timed: beyond the limit dynamo would go on uncompiled.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = 64
        record: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": records.commit(),
            "machine": doctor.machine(),
            "threads": torch.get_num_threads(),
            "protocol": asdict(Protocol(budget=budget)),
            "cells": [],
        }
        earlier = _undisturbed(out, record) if again else {}
        wanted = [Cell(layer, rows, m, *shape) for shape in SHAPES for layer in KINDS for m in SCENARIOS]
        for index, cell in enumerate(wanted, start=1):
            if cell in earlier:
                record["cells"].append(earlier[cell])
                continue
            click.echo(f"[{index}/{len(wanted)}] {cell}", err=True)
            record["cells"].append(measure(cell, Protocol(budget=budget), wait))
            # What is known already of later cells stays, should this run end here.
            later = [earlier[after] for after in wanted[index:] if after in earlier]
            records.write(out, record | {"cells": record["cells"] + later})
    record = json.loads(out.read_text(encoding="utf-8"))
    click.echo(table(record))
    if out == RESULTS:
        PAGE.write_text(render(record, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
