"""The tables of docs/gpu-model.md from a record of benchmarks/gpu_model.py."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

import page
from on_gpu.chip import Chip, Peer
from on_gpu.model import BACKWARD, LIMITS, PEER_STEP
from saml_kernels.backends.triton import configs

Record = dict[str, Any]
NAMES: Final = {"uniform": "uniform", "zipf": "Zipf"}
LARGER_TILES: Final = "†"
LEAST_CHANGE: Final = 0.005
"""Smaller changes of a total are shown as none."""


def texts(record: Record) -> dict[str, str]:
    """Marker → what stands there."""
    tables = {
        "predicted": totals(record),
        "predicted launches": launches(record),
        "predicted with other tiles": other_tiles(record),
        "sensitivity": sensitivity(record),
        "assumptions": assumptions(record),
    }
    return {name: f"{text}\n" for name, text in tables.items()}


def totals(record: Record) -> str:
    """Forward in both schedules and backward of every batch, beside the peer."""
    head = ["B", "M", "scenarios"]
    head += [f"forward, {name}" for name in configs.SCHEDULES]
    head += [
        "predicted faster",
        "built in",
        "backward",
        "step",
        "peer: forward",
        "peer: step",
        "peer / kernels: forward",
        "step",
    ]
    return page.markdown(head, [_total(cell) for cell in record["cells"]])


def _total(cell: Record) -> list[str]:
    forward, backward, peer = cell["forward"], cell[BACKWARD], cell["peer"]
    mark = "" if cell["built_in_tiles"] else f" {LARGER_TILES}"
    faster = min(forward, key=lambda name: forward[name])
    step, peer_step = forward[faster] + backward, sum(peer.values())
    return [
        str(cell["B"]),
        str(cell["M"]),
        NAMES[cell["distribution"]],
        *(page.digits(forward[name]) + mark for name in configs.SCHEDULES),
        f"{faster}, {max(forward.values()) / forward[faster]:.2f}×",
        cell["built_in"],
        *map(page.digits, (backward, step, peer["forward"], peer_step)),
        f"{peer['forward'] / forward[faster]:.2f}",
        f"{peer_step / step:.2f}",
    ]


def launches(record: Record) -> str:
    """Every launch of uniform batches, and what its time goes to, in per cent."""
    head = [
        "B",
        "M",
        "schedule",
        "launch",
        "tiles, warps, stages",
        "programs",
        "µs",
        *(f"{limit}, %" for limit in LIMITS),
        "most work, %",
    ]
    rows = [
        [*_launch(cell, launch), *(_percent(launch["shares"][limit]) for limit in LIMITS), _most_work(launch)]
        for cell in record["cells"]
        if cell["distribution"] == "uniform"
        for launch in cell["launches"]
    ]
    return page.markdown(head, rows)


def _most_work(launch: Record) -> str:
    """The two stages that programs work on for longest."""
    return ", ".join(f"`{stage}` {_percent(share)}" for stage, share in list(launch["stages"].items())[:2])


def _percent(share: float) -> str:
    percent = f"{abs(100 * share):.0f}"
    return "–" if percent == "0" else percent


def _launch(cell: Record, launch: Record) -> list[str]:
    named = [launch[name] for name in ("schedule", "launch", "tiles")]
    return [str(cell["B"]), str(cell["M"]), *named, str(launch["programs"]), page.digits(launch["us"])]


def other_tiles(record: Record) -> str:
    """The launches with tiles that are not built in for their batch."""
    head = ["B", "M", "schedule", "launch", "tiles, warps, stages", "programs", "µs", "as above, µs", "spilled bytes"]
    rows = [
        [*_launch(cell, launch), _as_above(cell, launch), str(launch["spilled_bytes"] or "–")]
        for cell in record["cells"]
        for launch in cell["other_tiles"]
    ]
    return page.markdown(head, rows) if rows else "The file of counts has no launch with other tiles."


def _as_above(cell: Record, launch: Record) -> str:
    same = ("schedule", "launch")
    above = next(each for each in cell["launches"] if all(each[name] == launch[name] for name in same))
    return page.digits(above["us"])


def sensitivity(record: Record) -> str:
    """Totals as multiples of what they are, with a guess halved and doubled."""
    totals = (*configs.SCHEDULES, BACKWARD, PEER_STEP)
    cells = list(dict.fromkeys((entry["B"], entry["M"]) for entry in record["sensitivity"]))
    head = ["guess", *(f"{name}, B = {B}, M = {M}" for B, M in cells for name in totals)]
    found = {(e["guess"], e["B"], e["M"], e["factor"]): e["totals"] for e in record["sensitivity"]}
    rows = [
        [f"`{guess}`", *(_change(found, guess, cell, name) for cell in cells for name in totals)]
        for guess in dict.fromkeys(entry["guess"] for entry in record["sensitivity"])
    ]
    return page.markdown(head, rows)


def _change(found: Mapping[Any, Any], guess: str, cell: tuple[int, int], name: str) -> str:
    halved, doubled = (found[guess, *cell, factor][name] for factor in (0.5, 2.0))
    if max(abs(halved - 1), abs(doubled - 1)) < LEAST_CHANGE:
        return "–"
    return f"{halved:.2f} / {doubled:.2f}"


def assumptions(record: Record) -> str:
    """Every number that is not counted."""
    rows = [row for kind in (Chip, Peer) for row in _numbers(kind, record[kind.__name__.lower()])]
    return page.markdown(["number", "value", "unit", "source, or why it is guessed"], rows)


def _numbers(kind: type, values: Record) -> Iterator[list[str]]:
    for field in dataclasses.fields(kind):
        guessed = "**guess**: " if field.metadata["guess"] else ""
        name = f"`{field.name}`" if kind is Chip else f"peer: `{field.name}`"
        yield [name, f"{values[field.name]:.6g}", field.metadata["unit"], guessed + field.metadata["source"]]
