"""Times the layers of STAR, HMoE and the shared bottom's towers against plain PyTorch, and writes results/models.json.

    python benchmarks/models.py              # and the table of docs/layers.md
    python benchmarks/models.py --render     # the table again, from the results

Every layer computes the same function in plain PyTorch in the ways one would write it: towers one by one on their
scenario's rows ("grouped", eager and compiled), all towers on all rows as batched products and then picked
("all_towers", what public code does). Protocol and gate are those of docs/benchmarks.md: correct to 1e−5 of float64 in
outputs and gradients before anything is timed, then interleaved rounds, medians, ratio to the best peer.
"""

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor, nn

import timing
from saml_kernels import doctor
from saml_kernels.layers import STARMLP, GroupedMLP, ScoreMixture
from timing import Protocol

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "models.json"
PAGE: Final = HERE.parent / "docs" / "layers.md"
BETWEEN: Final = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- end -->)", re.DOTALL)
BOUND: Final = 1e-5
IN_DIM: Final = 256
WIDTHS: Final = (512, 256, 128, 1)

Parameters = tuple[list[Tensor], list[Tensor]]
Towers = Callable[[Tensor, Tensor, Parameters], Tensor]


@dataclass(frozen=True)
class Kind:
    """A layer, and how plain PyTorch gets from its parameters to its output with one way to run towers."""

    make: Callable[[int, str], nn.Module]
    plain: Callable[[Any, Tensor, Tensor, Towers], Tensor]


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
    """Foreign scores without a graph, the own one by ``towers``."""
    parameters = list(layer.networks.weights), list(layer.networks.biases)
    with torch.no_grad():
        foreign = every_tower(x, parameters).squeeze(2)
    own = towers(x, scenario, parameters)
    logits = foreign.scatter(1, scenario.unsqueeze(1), own)
    predictions = torch.sigmoid(logits)
    return torch.logit((torch.softmax(layer.gate(x), 1) * predictions).sum(1))


KINDS: Final = {
    "towers (GroupedMLP)": Kind(
        lambda m, backend: GroupedMLP(m, IN_DIM, WIDTHS, output_activation="identity", backend=backend), _towers
    ),
    "STAR (STARMLP)": Kind(
        lambda m, backend: STARMLP(m, IN_DIM, WIDTHS, output_activation="identity", backend=backend), _star
    ),
    "HMoE (ScoreMixture)": Kind(lambda m, backend: ScoreMixture(m, IN_DIM, WIDTHS[:-1], backend=backend), _mixture),
}


def measure(kind: Kind, rows: int, scenarios: int, protocol: Protocol) -> dict[str, Any]:
    """Errors and seconds of all contenders for one layer."""
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = kind.make(scenarios, "cpp")
    x = torch.randn(rows, IN_DIM, requires_grad=True)
    scenario = torch.randint(scenarios, (rows,))
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "grouped": lambda x: kind.plain(layer, x, scenario, grouped),
        "all_towers": lambda x: kind.plain(layer, x, scenario, all_towers),
        "cpp": lambda x: layer(x, scenario),
    }
    functions["grouped, compiled"] = torch.compile(functions["grouped"], dynamic=False)
    leaves = [x, *layer.parameters()]

    exact = kind.make(scenarios, "reference").double()
    exact.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    out = exact(wide, scenario)
    cotangent = torch.randn(out.shape)
    reference = [out, *torch.autograd.grad(out, [wide, *exact.parameters()], cotangent.double())]

    errors: dict[str, float] = {}
    for name, function in functions.items():
        out = function(x)
        results = [out, *torch.autograd.grad(out, leaves, cotangent)]
        errors[name] = max(
            float((result.detach().double() - expected.detach()).norm() / expected.detach().norm())
            for result, expected in zip(results, reference, strict=True)
        )
    passed = {name: function for name, function in functions.items() if errors[name] <= BOUND}

    def forward(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return function(x)

        call()
        return call

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x), leaves, cotangent)

    passes = {}
    for name, make in (("forward", forward), ("step", step)):
        with timing.Others() as others:
            seconds = timing.interleave({key: make(function) for key, function in passed.items()}, protocol)
        passes[name] = {"seconds": seconds, "others": others.share}
    return {"B": rows, "M": scenarios, "errors": errors, "passes": passes}


def table(record: dict[str, Any]) -> str:
    """Times of the layer and of its best peer, and their ratio, in Markdown."""
    lines = [
        "| layer | M | pass | best plain PyTorch, ms | fused, ms | × | all_towers ÷ fused |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cells in record["layers"].items():
        for cell in cells:
            for kind, timed in cell["passes"].items():
                seconds = timed["seconds"]
                peers = {peer: values for peer, values in seconds.items() if peer != "cpp"}
                best = timing.fastest(peers)
                own, ratio = timing.summary(seconds["cpp"]), timing.ratio(seconds[best], seconds["cpp"])
                public = timing.ratio(seconds["all_towers"], seconds["cpp"])
                lines.append(
                    f"| {name} | {cell['M']} | {kind} | {timing.summary(seconds[best]).median * 1e3:.1f} ({best}) | "
                    f"{own.median * 1e3:.1f} | {ratio.median:.2f} ({ratio.p20:.2f}–{ratio.p80:.2f}) | "
                    f"{public.median:.1f} |"
                )
    machine = record["machine"]
    rows = next(iter(record["layers"].values()))[0]["B"]
    lines += [
        "",
        f"B = {rows}, x of width {IN_DIM}, widths {WIDTHS}, float32, {record['threads']} threads, "
        f"{machine['processor']}, torch {machine['torch']}; {record['started'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def render(record: dict[str, Any], page: str) -> str:
    """The page with the record's table in its place."""
    return BETWEEN.sub(lambda _: table(record), page)


@click.command(help=__doc__)
@click.option("--rows", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--budget", type=click.FloatRange(0, min_open=True), default=8.0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--render", "only_render", is_flag=True, help="Only the table, from the results")
def main(rows: int, budget: float, out: Path, only_render: bool) -> None:
    if not only_render:
        torch._dynamo.config.recompile_limit = 64
        record: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": doctor.machine(),
            "threads": torch.get_num_threads(),
            "protocol": asdict(Protocol(budget=budget)),
            "layers": {},
        }
        for name, kind in KINDS.items():
            click.echo(name, err=True)
            record["layers"][name] = [measure(kind, rows, m, Protocol(budget=budget)) for m in (8, 32)]
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(out.read_text(encoding="utf-8"))
    click.echo(table(record))
    if out == RESULTS:
        PAGE.write_text(render(record, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
