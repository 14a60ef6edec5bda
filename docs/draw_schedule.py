"""Writes docs/figures/schedule.svg and the code beside it in docs/architecture.md: python docs/draw_schedule.py

The figure is the order of the kernel's own schedule (saml_kernels.backends.triton.schedule), with a model of time: an
item takes as long as it multiplies, nothing else costs anything. Nothing in it was measured.
"""

import ast
import dataclasses
import io
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure

from saml_kernels.backends.triton import configs, schedule
from saml_kernels.backends.triton.configs import Config
from saml_kernels.backends.triton.schedule import Item, Order
from saml_kernels.backends.triton.stages import Layer, Stage
from saml_kernels.backends.triton.trunk import TrunkShape, forward_program

DOCS = Path(__file__).parent
FIGURE = DOCS / "figures" / "schedule.svg"
PAGE = DOCS / "architecture.md"
KERNEL = DOCS.parent / "saml_kernels" / "backends" / "triton" / "kernels" / "persistent.py"
SHOWN = ("persistent_kernel", "draw", "locate", "wait", "run", "release")

ROWS = (250, 130, 60)
"""Rows of each scenario: 440, that is 7 tiles of any rows and 8 of one scenario."""
PROGRAMS = 6
CONFIG = Config(64, 128, 64, 8, 3)
SHAPE = TrunkShape(
    num_scenarios=len(ROWS),
    local_dim=256,
    global_dim=256,
    per_branch=False,
    widths=(256, 128),
    aux_widths=(256, 128),
    gates=(256, 0),
    activations=("relu", "relu"),
    score="ratio",
)
COLORS = {"A0": "#b8c4ce", "V0": "#4c8bf5", "G0": "#f2a33a", "M0": "#d9534f", "A1": "#8796a3", "V1": "#2a9d8f"}


class Run(NamedTuple):
    """An item on a program."""

    item: Item
    program: int
    drawn: float
    start: float
    end: float


def stages() -> list[Stage]:
    """The forward's stages, cut."""
    return [
        dataclasses.replace(stage, tile=configs.tile(stage, CONFIG, torch.bfloat16, True, "ieee"))
        for stage in forward_program(SHAPE, save=True).stages
    ]


def cost(stage: Stage) -> float:
    """Columns of k that an item of a product multiplies; a mutual unit's reads stand for a few."""
    return float(stage.first.k + stage.second.k) if isinstance(stage, Layer) else 64.0


def timeline(order: Order, cut: list[Stage], offsets: list[int]) -> list[Run]:
    """Programs draw items one by one and wait for what theirs needs."""
    free = [0.0] * PROGRAMS
    done: dict[tuple[int, int], float] = {}
    runs: list[Run] = []
    for item in schedule.items(order, offsets):
        program = min(range(PROGRAMS), key=lambda each: (free[each], each))
        drawn = free[program]
        start = max([drawn, *(done[needed] for needed in schedule.waits_for(order, item, offsets))])
        end = start + cost(cut[item.stage])
        free[program] = end
        done[item.stage, item.tile] = max(done.get((item.stage, item.tile), 0.0), end)
        runs.append(Run(item, program, drawn, start, end))
    return runs


def drawing() -> str:
    """The figure, SVG."""
    cut = stages()
    offsets = [0, *itertools.accumulate(ROWS)]
    order = schedule.order(cut, [0] * len(cut), CONFIG.block_m, len(ROWS), PROGRAMS)
    runs = timeline(order, cut, offsets)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "schedule", "font.size": 7}):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            name = str(cut[run.item.stage].name)
            axes.broken_barh(
                [(run.start, run.end - run.start)],
                (run.program - 0.44, 0.88),
                facecolor=COLORS[name],
                edgecolor="white",
                linewidth=0.6,
            )
            if run.start > run.drawn:
                axes.broken_barh(
                    [(run.drawn, run.start - run.drawn)], (run.program - 0.1, 0.2), facecolor="none", edgecolor="#888"
                )
            if run.end - run.start >= 200:
                axes.text((run.start + run.end) / 2, run.program, run.item.tile, ha="center", va="center")
        names = [str(stage.name) for stage in cut]
        handles = [axes.broken_barh([(0, 0)], (0, 0), facecolor=COLORS[name], label=name) for name in names]
        axes.legend(handles=handles, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        axes.set_yticks(range(PROGRAMS), [f"program {number}" for number in range(PROGRAMS)])
        axes.set_ylim(PROGRAMS - 0.4, -0.6)
        axes.set_xlim(0, max(run.end for run in runs))
        axes.set_xticks([])
        axes.set_xlabel("time, as a model: an item takes as long as it multiplies")
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        figure.patch.set_facecolor("white")
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def code() -> str:
    """The kernel and the functions it reads as."""
    text = KERNEL.read_text(encoding="utf-8")
    lines = text.splitlines()
    shown = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in SHOWN]
    return "\n\n\n".join("\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno]) for node in shown)


def page() -> str:
    """docs/architecture.md with the code as it is."""
    block = f"<!-- kernel -->\n```python\n{code()}\n```\n<!-- end -->"
    written = PAGE.read_text(encoding="utf-8")
    return re.sub(r"<!-- kernel -->.*?<!-- end -->", lambda _: block, written, flags=re.DOTALL)


if __name__ == "__main__":
    FIGURE.write_text(drawing(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
