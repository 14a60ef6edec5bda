"""What work items cost in machine code: a step of a product's main loop, a row of a mutual unit, and what is around.

    python tests/triton/costs.py      writes benchmarks/results/gpu_assembly.json and the table of docs/gpu-kernels.md

Loops are told apart by the lines of the source they come from. Instructions and barriers are a warp's.
"""

import dataclasses
import functools
import itertools
import json
import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aot
import torch
import triton
from assembly import BARRIER, MATRIX, Instruction, Loop, count

from saml_kernels.backends.triton import configs, kernels
from saml_kernels.backends.triton.configs import Choice
from saml_kernels.backends.triton.sharing import Varying
from saml_kernels.backends.triton.stages import ProductTile

CHIP = aot.CHIPS["sm_90"]
SCENARIOS = 8, 32
ROWS = 1024, 4096
"""Of small tiles and of large ones."""
PRODUCTS_A_CYCLE = 2048
"""Of 16-bit factors on a multiprocessor of sm_90: NVIDIA's H100 white paper, dense."""
SCHEDULERS = 4
"""Of a multiprocessor; each issues an instruction of a warp a cycle."""
ITEM_FILES = "persistent.py", "scenario_tiles.py"
PRODUCT_FILES = "product.py", "activations.py", "values.py", "weight_gradient.py"
MUTUAL_FILES = "mutual.py", "standard.py"
"""Sums of Triton's library are the mutual unit's, but for a few that find a tile."""
FOLDER = Path(kernels.__file__).parent
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "gpu_assembly.json"


@dataclass(frozen=True)
class Count:
    """Of a warp."""

    instructions: float
    barriers: float
    matrix: int = 0

    @staticmethod
    def of(instructions: Iterable[Instruction]) -> "Count":
        found = tuple(instructions)
        return Count(len(found), count(found, BARRIER), count(found, MATRIX))


@dataclass(frozen=True)
class Body:
    """The code of stages that share it."""

    kind: str
    stages: tuple[str, ...]
    tile: Any
    repeated: Count
    """A step of a product's main loop, or a row of a mutual unit."""
    once: Count
    """Besides, of an item."""

    def share_of_issue(self, num_warps: int) -> float:
        """Of a product: cycles in which a step's instructions are issued, over those its matrix instructions take."""
        products = self.tile.block_m * self.tile.block_n * self.tile.block_k
        return self.repeated.instructions * num_warps / SCHEDULERS / (products / PRODUCTS_A_CYCLE)


@dataclass(frozen=True)
class LaunchCosts:
    """The code of a launch."""

    M: int
    schedule: str
    title: str
    report: aot.Report
    num_warps: int
    num_stages: int
    item: Count
    """Drawing, locating, waiting and releasing."""
    bodies: tuple[Body, ...]


def costs_of(launch: aot.Recorded, M: int, schedule: str) -> LaunchCosts:
    """Compiled for CHIP."""
    code = aot.disassembled(launch, CHIP)
    waits = launch.name == "persistent_kernel" and bool(launch.plan.persistent)
    item = max(code.loops, key=lambda loop: len(loop.every)) if waits else None
    loops = item.inner if item else code.loops
    places = (item.places if item else code.reached) - frozenset().union(*(loop.places for loop in loops))
    around = [code.instructions[place] for place in sorted(places)]
    return LaunchCosts(
        M,
        schedule,
        aot.title(launch),
        aot.compile_for(launch, CHIP),
        dict(launch.options)["num_warps"],
        dict(launch.options)["num_stages"],
        Count.of(each for each in around if each.file in ITEM_FILES),
        tuple(_body(launch, number, loops, around) for number in range(len(aot.plain(launch.plan.bodies)))),
    )


def _body(launch: aot.Recorded, number: int, loops: tuple[Loop, ...], around: list[Instruction]) -> Body:
    stage = aot.plain(launch.plan.bodies)[number].stage
    body_of = aot.plain(launch.plan.slots).body
    names = tuple(name for n, name in enumerate(launch.stages) if stage_number(body_of, n) == number)
    if isinstance(stage.tile, ProductTile):
        loop = _product_loop(stage, loops)
        once = Count.of(each for each in around if each.file in PRODUCT_FILES)
        return Body(type(stage).__name__, names, stage.tile, Count.of(loop.every), once)
    return Body(type(stage).__name__, names, stage.tile, _row(stage, loops, around), Count(0, 0))


def stage_number(leaf: Any, stage: int) -> int:
    """The number of a stage in a description."""
    return int(dict(leaf.values)[stage] if isinstance(leaf, Varying) else leaf)


def _product_loop(stage: Any, loops: tuple[Loop, ...]) -> Loop:
    """The main loop; of weights' gradients the one that reads the permutation, or not."""
    products = [loop for loop in loops if count(loop.every, MATRIX)]
    if len(products) > 1:
        gathered = any(possible(rows.gathered) for rows in (stage.first, stage.second))
        products = [loop for loop in products if _reads_permutation(loop) == gathered]
    (found,) = products
    return found


def _reads_permutation(loop: Loop) -> bool:
    lines = {each.line for each in loop.every if each.file == "weight_gradient.py"}
    return any("permutation" in linecache.getline(str(FOLDER / "weight_gradient.py"), line) for line in lines)


def possible(leaf: Any) -> bool:
    """Whether a flag of a description is set for some stage."""
    return any(number for _, number in leaf.values) if isinstance(leaf, Varying) else bool(leaf)


def _row(stage: Any, loops: tuple[Loop, ...], around: list[Instruction]) -> Count:
    """Of a mutual unit: two loops over blocks of columns, and what is around them, by the rows of a group."""
    groups = [loop for loop in loops if not count(loop.every, MATRIX) and _mostly_mutual(loop)]
    if len(groups) == 1 and groups[0].inner:
        blocks, rest = groups[0].inner, groups[0].own
    else:
        blocks, rest = tuple(groups), tuple(each for each in around if each.file in MUTUAL_FILES)
    turns = -(-int(stage.d) // stage.tile.columns)
    total, extra = Count.of(each for loop in blocks for each in loop.every), Count.of(rest)
    return Count(
        (turns * total.instructions + extra.instructions) / stage.tile.rows,
        (turns * total.barriers + extra.barriers) / stage.tile.rows,
    )


def _mostly_mutual(loop: Loop) -> bool:
    return 2 * sum(each.file in MUTUAL_FILES for each in loop.every) > len(loop.every)


@functools.cache
def listed() -> tuple[LaunchCosts, ...]:
    """Every launch of a bf16 training step of the documented shape, in both schedules, each once."""
    return tuple(_distinct((M, _built_in(M)) for M in SCENARIOS))


def _built_in(M: int) -> list[Choice]:
    buckets = (configs.Bucket.of(rows, M, max(aot.Trunk().hidden_dims)) for rows in ROWS)
    return [configs.built_in(bucket, 2, CHIP.family) for bucket in buckets]


def every_candidate() -> tuple[LaunchCosts, ...]:
    """The same, and with every candidate of tuning in its place."""
    return tuple(_distinct((M, [*_built_in(M), *_with_candidates(_built_in(M)[-1])]) for M in SCENARIOS))


def _with_candidates(choice: Choice) -> Iterator[Choice]:
    for part in ("forward", "backward", "weights", "layer"):
        for config in configs.candidates(part, 2, CHIP.family):
            yield dataclasses.replace(choice, **{part: config})


def _distinct(choices: Iterable[tuple[int, Iterable[Choice]]]) -> Iterator[LaunchCosts]:
    seen: set[tuple[int, aot.Recorded]] = set()
    for M, of_scenarios in choices:
        for choice, schedule in itertools.product(of_scenarios, configs.SCHEDULES):
            for launch in aot.recorded(torch.bfloat16, aot.Trunk(M=M), schedule, choice):
                if (M, launch) not in seen:
                    seen.add((M, launch))
                    yield costs_of(launch, M, schedule)


def result(launches: Iterable[LaunchCosts]) -> dict[str, Any]:
    """What the file holds of launches."""
    trunk = aot.Trunk()
    shape = {"local_dim": 256, "global_dim": trunk.global_dim, "hidden_dims": trunk.hidden_dims, "M": SCENARIOS}
    return {
        "kind": "counted in machine code; nothing was measured",
        "command": "python tests/triton/costs.py",
        "triton": triton.__version__,
        "chip": CHIP.name,
        "type": "bf16",
        "shape": shape,
        "launches": [_launch_entry(launch) for launch in launches],
    }


def _launch_entry(launch: LaunchCosts) -> dict[str, Any]:
    return {
        "M": launch.M,
        "schedule": launch.schedule,
        "title": launch.title,
        "registers": launch.report.registers,
        "spilled_bytes": launch.report.spilled_bytes,
        "shared_memory": launch.report.shared_memory,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "item": _count_entry(launch.item),
        "bodies": [_body_entry(body) for body in launch.bodies],
    }


def _body_entry(body: Body) -> dict[str, Any]:
    start = {"kind": body.kind, "stages": list(body.stages)}
    if isinstance(body.tile, ProductTile):
        tile = {name: getattr(body.tile, name) for name in ("block_m", "block_n", "block_k")}
        return start | tile | {"step": _count_entry(body.repeated), "once": _count_entry(body.once)}
    tile = {"item_rows": body.tile.item_rows, "rows": body.tile.rows, "columns": body.tile.columns}
    return start | tile | {"row": _count_entry(body.repeated), "once": _count_entry(body.once)}


def _count_entry(found: Count) -> dict[str, float]:
    entry = {"instructions": round(found.instructions, 1), "barriers": round(found.barriers, 2)}
    return entry | ({"matrix": found.matrix} if found.matrix else {})


def table() -> str:
    """The loops of every launch, in Markdown."""
    lines = [
        "| M | launch | body | tile | instructions | barriers | issue slots |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for launch in listed():
        for body in launch.bodies:
            start = f"| {launch.M} | {launch.title} | {body.kind} {_some(body.stages)} "
            if isinstance(body.tile, ProductTile):
                tile = f"{body.tile.block_m} × {body.tile.block_n} × {body.tile.block_k}, {launch.num_warps} warps"
                share = f"{body.share_of_issue(launch.num_warps):.0%}"
            else:
                tile, share = f"{body.tile.rows} rows × {body.tile.columns}, {launch.num_warps} warps", ""
            numbers = f"{body.repeated.instructions:.0f} | {body.repeated.barriers:.1f}"
            lines.append(f"{start}| {tile} | {numbers} | {share} |")
    return "\n".join(lines)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")


BETWEEN = re.compile(r"(?<=<!-- loops -->\n).*?(?=<!-- end of loops -->)", re.DOTALL)


if __name__ == "__main__":
    RESULT.write_text(json.dumps(result(every_candidate()), indent=1) + "\n", encoding="utf-8")
    page = aot.PAGE.read_text(encoding="utf-8")
    aot.PAGE.write_text(BETWEEN.sub(lambda _: table() + "\n", page), encoding="utf-8")
