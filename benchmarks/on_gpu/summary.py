"""A record in a few tables of text."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from cells import GRAPH
from on_gpu import floors
from on_gpu.pieces import FAILED, PASSED, SKIPPED
from on_gpu.processes import LEFT_OUT, OUT_OF_TIME
from records import Cell
from saml_kernels.testing.problem import PASSES

Record = dict[str, Any]
ENDED_WELL = ("done", "cut short")
LINES_PRINTED = 6
"""Of what a failed process printed."""


def failures(record: Record) -> list[str]:
    """What failed: checks, sections, and the gate of our own contenders, a line each. Floors are not part of it."""
    gates = [
        f"{section}, {cell.name}, {entry['name']}: {entry['failure']}"
        for section in ("headline", "grid", "precision")
        for cell in floors.timed(record, section)
        for entry in cell.contenders.values()
        # Left out for want of time is no failure.
        if not entry["peer"] and not entry.get("failure", "left out").startswith("left out")
    ]
    gates += [
        f"stages, {cell.name}: {cell.data['failure']}"
        for cell in floors.timed(record, "stages")
        if "failure" in cell.data
    ]
    results = [
        f"{section}, {result['name']}: {result.get('reason', result['status'])}"
        for section, result in _results(record)
        if result["status"] in (FAILED, OUT_OF_TIME)
    ]
    results += [
        f"{section}, B={shape['B']} M={shape['M']}: {shape['failure']}"
        for section, name in (("launches_timed", "cells"), ("tune", "shapes"))
        for shape in record["sections"].get(section, {}).get(name, [])
        if not shape.get("failure", LEFT_OUT).startswith(LEFT_OUT)
    ]
    checks = [f"{name}: {check['status']}" for name, check in _checks(record) if check["passed"] is False]
    sections = [
        f"section {name}: {part['status']}"
        for name, part in record["sections"].items()
        if part["status"] not in ENDED_WELL
    ]
    return [*checks, *sections, *results, *gates]


def text(record: Record) -> str:
    """Checks, sections, the headline's first cell, the stages, and every floor; what failed, at the end."""
    lines = [f"{record['kind']}: {record['device']['name']}, commit {record['commit']}", ""]
    for name, check in _checks(record):
        lines.append(f"{name:<24}{_mark(check['passed'])}  {check['status']}  {check.get('seconds', '–')} s")
        if check["passed"] is False:
            lines += [f"    {line}" for line in check["tail"].splitlines()[-8:]]
    lines.append("")
    for name, part in record["sections"].items():
        counts = Counter(result["status"] for result in part.get("results", []))
        told = ", ".join(f"{count} {status}" for status, count in counts.items()) or part.get("reason", "")
        lines.append(f"{name:<24}{part['status']}  {part.get('seconds', '–')} s  {told}")
        left_out = [*part.get("left_out", []), *(each for cell in part.get("cells", []) for each in _left_out(cell))]
        lines += [f"    left out: {', '.join(left_out)}"] if left_out else []
    for section, result in _results(record):
        if result["status"] not in (PASSED, SKIPPED):
            lines.append(f"{section}, {result['name']}: {result['status']}  {result.get('reason', '')}")
            lines += [f"    {line}" for line in result.get("output", "").splitlines()[-LINES_PRINTED:]]
    ceilings = floors.rates(record)
    known = [f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.items() if rate]
    lines += ["", "ceilings, T/s: " + ", ".join(known), *_launches(record), ""]
    for cell in floors.timed(record, "headline")[:1]:
        lines += [*_cell(cell, ceilings), ""]
    for cell in floors.timed(record, "stages"):
        lines += [f"{cell.name}, µs in a launch of its own"]
        lines += [f"{row.measured:<10}{row.contender:<32}{row.median * 1e6:>10.2f}" for row in cell.rows.values()] + [
            ""
        ]
    lines += _timed_launches(record["sections"].get("launches_timed", {}))
    lines += _tuned(record["sections"].get("tune", {}))
    lines += _floors(record)
    if record["dry_run"]:
        lines += ["", "A dry run on the CPU: none of these numbers is a GPU's."]
    if failed := failures(record):
        lines += ["", "FAILED:", *failed]
    return "\n".join(lines)


def _results(record: Record) -> Iterator[tuple[str, Record]]:
    """Of the sections that check: section and result."""
    for name, part in record["sections"].items():
        for result in part.get("results", []):
            yield name, result


def _left_out(cell: Record) -> list[str]:
    """Of one cell, with its name."""
    return [f"B={cell['B']} M={cell['M']} {name}" for name in cell.get("left_out", [])]


def _tuned(part: Record) -> list[str]:
    """A line a shape: how much faster it became, or why not."""
    lines = []
    for shape in part.get("shapes", []):
        times = [f"{name} {shape[name]['ratio']:.2f} times as fast" for name in PASSES if shape.get(name)]
        told = shape.get("failure") or ", ".join(times) or "the built-in choice is kept"
        lines.append(f"tuned, B={shape['B']} M={shape['M']}: {told}")
    lines += [f"not tuned: {name}: {failure}" for name, failure in part.get("skipped", {}).items()]
    return [*lines, ""] if lines else []


def _timed_launches(part: Record) -> list[str]:
    """A line a launch, beside torch's products of the same sizes; a line a variation of the built-in choice."""
    lines = []
    built_in: dict[tuple[str, str], float] = {}
    for cell in part.get("cells", []):
        told = cell.get("failure", "µs, TFLOP/s, torch's TFLOP/s, torch's time over ours")
        lines.append(f"B={cell['B']} M={cell['M']} {cell['schedule']}: {told}")
        for row in cell.get("launches", []):
            rates = "".join(
                f"{row[name]:>9.2f}" if name in row else f"{'–':>9}" for name in ("tflops", "torch_tflops", "ratio")
            )
            stages = " ".join(stage.split()[0] for stage in row["stages"])
            name = f"  {row['pass']:<9}{row['number']:<3}{row['name']:<24}"
            lines.append(f"{name}{row['median'] * 1e6:>10.2f}{rates}  {stages}")
        if (cell["B"], cell["M"]) == (part["cells"][0]["B"], part["cells"][0]["M"]):
            built_in |= {(cell["schedule"], kind): seconds for kind, seconds in _by_part(cell).items()}
    for entry in part.get("variations", []):
        before = built_in.get((entry["schedule"], entry["part"]))
        usual = f", {before * 1e6:.2f} as built in ({entry['built_in']})" if before else ""
        varied = sum(_by_part(entry).values())
        lines.append(f"  {entry['name']:<48}{entry.get('failure') or f'{varied * 1e6:.2f} µs{usual}'}")
    return [*lines, ""] if lines else []


def _by_part(cell: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of all launches of forward, backward and weight gradients."""
    sums: dict[str, float] = {}
    for row in cell.get("launches", []):
        sums[row["part"]] = sums.get(row["part"], 0.0) + row["median"]
    return sums


def _checks(record: Record) -> list[tuple[str, Record]]:
    """Without the warming processes, which may be ended early."""
    return [(name, check) for name, check in record["checks"].items() if not name.startswith("compiling ")]


def _launches(record: Record) -> list[str]:
    """How many kernels a call runs, over the shapes."""
    lines = []
    for entry in record["sections"].get("launches", {}).get("counts", []):
        kinds = [
            f"{kind} {sum(entry[kind].values())}" for kind in ("inference", "forward", "backward") if kind in entry
        ]
        found = entry.get("failure") or ", ".join(kinds)
        lines.append(f"kernels, {entry['schedule']}, B={entry['B']} M={entry['M']} L={entry['L']}: {found}")
    return lines


def _cell(cell: Cell, ceilings: dict[str, float | None]) -> list[str]:
    """A line a contender; milliseconds, eager and from a graph."""
    columns = [(kind, mode) for kind in PASSES for mode in ("", GRAPH)]
    heads = "".join(f"{kind + mode:>16}" for kind, mode in columns)
    lines = [f"{cell.name}, ms", f"{'':<44}{heads}   roof  peak MiB"]
    for name, entry in cell.contenders.items():
        if "failure" in entry:
            lines.append(f"{name:<44}{entry['failure']}")
            continue
        values = [cell.median(name + mode, kind) for kind, mode in columns]
        shown = "".join(f"{'–' if value is None else f'{value * 1e3:.4f}':>16}" for value in values)
        schedule = None if entry["peer"] or "foreign_dtype" in entry else entry.get("schedule", "auto")
        share = floors.fraction(cell, "forward", ceilings, schedule) if schedule else None
        peak = entry.get("peak_bytes")
        lines.append(
            f"{name:<44}{shown}{'–' if share is None else f'{share:.0%}':>7}"
            f"{'–' if peak is None else f'{peak / 2**20:.0f}':>10}"
        )
        if "no_graph" in entry:
            lines.append(f"    no graph: {entry['no_graph']}")
    return lines


def _floors(record: Record) -> list[str]:
    """Every floor, and how many hold."""
    lines, every = [], record.get("floors", [])
    for floor in every:
        measured = "not measured" if floor["measured"] is None else f"{floor['measured']:.2f}"
        bound = "≤" if floor["at_most"] else "≥"
        lines.append(
            f"{_mark(floor['holds'])} {floor['statement']:<42}{floor['cell']:<16}{measured:>13} {bound} "
            f"{floor['needed']:.2f}  {floor['against']}"
        )
    told = [floor["holds"] for floor in every if floor["holds"] is not None]
    return [*lines, f"{sum(told)} of {len(told)} floors hold, {len(every) - len(told)} not measured"]


def _mark(holds: bool | None) -> str:
    return {True: "yes", False: "NO ", None: "–  "}[holds]
