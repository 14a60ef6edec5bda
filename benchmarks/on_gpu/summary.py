"""A record in a few tables of text."""

from typing import Any

from contenders import PASSES
from on_gpu.cells import GRAPH
from on_gpu.floors import Timed, timed

Record = dict[str, Any]


def passed(record: Record) -> bool:
    """Nothing failed: checks, sections, and the gate of our own contenders. Floors are not part of it."""
    ours = [
        entry["gate"]["failure"]
        for section in ("headline", "grid", "precision")
        for cell in timed(record, section)
        for entry in cell.entries.values()
        if not entry["peer"]
    ]
    # Left out for want of time is no failure.
    wrong = [failure for failure in ours if failure is not None and not failure.startswith("left out")]
    return (
        not wrong
        and all(check["passed"] in (True, None) for name, check in _checks(record))
        and all(part["status"] in ("done", "cut short") for part in record["sections"].values())
    )


def text(record: Record) -> str:
    """Checks, sections, the headline's first cell, and every floor."""
    lines = [f"{record['kind']}: {record['device']['name']}, commit {record['commit']}", ""]
    for name, check in _checks(record):
        lines.append(f"{name:<24}{_mark(check['passed'])}  {check['status']}  {check.get('seconds', '–')} s")
        if check["passed"] is False:
            lines += [f"    {line}" for line in check["tail"].splitlines()[-8:]]
    lines.append("")
    for name, part in record["sections"].items():
        lines.append(f"{name:<24}{part['status']}  {part.get('seconds', '–')} s  {part.get('reason', '')}")
    rates = record["sections"].get("ceilings", {}).get("rates", {})
    known = [f"{name} {rate / 1e12:.3g}" for name, rate in rates.items() if rate]
    lines += ["", "ceilings, T/s: " + ", ".join(known), *_launches(record), ""]
    for cell in timed(record, "headline")[:1]:
        lines += [*_cell(cell, rates), ""]
    lines += _floors(record)
    if record["dry_run"]:
        lines += ["", "A dry run on the CPU: none of these numbers is a GPU's."]
    return "\n".join(lines)


def _checks(record: Record) -> list[tuple[str, Record]]:
    """Without the warming processes, which may be ended early."""
    return [(name, check) for name, check in record["checks"].items() if not name.startswith("compiling ")]


def _launches(record: Record) -> list[str]:
    """How many kernels a call runs, over the shapes."""
    counts = record["sections"].get("launches", {}).get("counts", [])
    lines = []
    for entry in counts:
        shape = f"kernels, {entry['schedule']}, B={entry['B']} M={entry['M']} L={entry['L']}: "
        if "failure" in entry:
            lines.append(shape + entry["failure"])
        else:
            kinds = ("inference", "forward", "backward")
            lines.append(shape + ", ".join(f"{kind} {sum(entry[kind].values())}" for kind in kinds))
    return lines


def _cell(cell: Timed, rates: dict[str, float | None]) -> list[str]:
    """A line a contender; milliseconds, eager and from a graph."""
    heads = [f"{kind}{mode}" for kind in PASSES for mode in ("", GRAPH)]
    lines = [f"{cell.name}, ms", f"{'':<44}" + "".join(f"{head:>16}" for head in heads) + "   roof  peak MiB"]
    for name, entry in cell.entries.items():
        if entry["gate"]["failure"] is not None:
            lines.append(f"{name:<44}{entry['gate']['failure']}")
            continue
        values = [cell.median(name + mode, kind) for kind in PASSES for mode in ("", GRAPH)]
        cells = "".join(f"{'–' if value is None else f'{value * 1e3:.4f}':>16}" for value in values)
        fraction = None if entry["peer"] else cell.roofline("forward", rates, entry)
        peak = entry["peak_bytes"]
        lines.append(
            f"{name:<44}{cells}{'–' if fraction is None else f'{fraction:.0%}':>7}"
            f"{'–' if peak is None else f'{peak / 2**20:.0f}':>10}"
        )
        if entry["no_graph"]:
            lines.append(f"    no graph: {entry['no_graph']}")
    return lines


def _floors(record: Record) -> list[str]:
    """Every floor, and how many hold."""
    lines = []
    for floor in record.get("floors", []):
        measured = "not measured" if floor["measured"] is None else f"{floor['measured']:.2f}"
        bound = "≤" if floor["at_most"] else "≥"
        lines.append(
            f"{_mark(floor['holds'])} {floor['statement']:<42}{floor['cell']:<16}{measured:>13} {bound} "
            f"{floor['needed']:.2f}  {floor['against']}"
        )
    told = [floor["holds"] for floor in record.get("floors", []) if floor["holds"] is not None]
    return [*lines, f"{sum(told)} of {len(told)} floors hold, {len(record.get('floors', [])) - len(told)} not measured"]


def _mark(holds: bool | None) -> str:
    return {True: "yes", False: "NO ", None: "–  "}[holds]
