"""Tables and figures from a record, and that the pages show the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import ceilings
import figures
import front_page
import page as page_tools
import records
import workload
from saml_kernels.testing.problem import PASSES

ROOT = Path(__file__).parents[1]


# One cell as trunk.py writes it, the rounds made up: `grouped` is the best peer, all_towers was screened out.
SECONDS = {
    "grouped": [0.4, 0.4, 0.8],
    "loop_gather": [0.9, 0.9, 0.9],
    "cpp": [0.2, 0.1, 0.4],
    "cpp, foreign bfloat16": [0.1, 0.1, 0.2],
    "product torch.mm float32": [0.2, 0.2, 0.2],
    "product oneDNN float32": [0.1, 0.1, 0.1],
}


def fake_cell(B: int, M: int) -> dict[str, Any]:
    def contender(name: str, peer: bool, failure: str | None = None) -> dict[str, Any]:
        found = {"failure": failure} if failure else {"error": 2e-7, "peak_bytes": 3 * 2**20}
        return {"name": name, "peer": peer, "dtype": "float32", **found}

    peers_of = {name: ["grouped", "loop_gather"] for name in SECONDS if not name.startswith("product")}
    rows = [row for kind in PASSES for row in records.rows(kind, SECONDS, peers_of, {"all_towers": 3.0})]
    return {
        "B": B,
        "M": M,
        "local_dim": 4,
        "global_dim": 4,
        "hidden_dims": [4, 2],
        "distribution": "uniform",
        "contenders": [
            contender("all_towers", True),
            contender("grouped", True),
            contender("loop_gather", True),
            contender("grouped, compiled", True, failure="CppCompileError: no compiler"),
            contender("cpp", False),
            contender("cpp, foreign bfloat16", False),
        ],
        "products": [
            {"name": f"product {library} float32", "library": library, "dtype": "float32"}
            for library in ("torch.mm", "oneDNN")
        ],
        "others": dict.fromkeys(PASSES, 0.02),
        "rows": rows,
    }


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "suite": "grid",
        "purpose": "made up",
        "complete": True,
        "started": "2020-01-01T00:00:00+00:00",
        "command": "python benchmarks/trunk.py --suite grid",
        "commit": None,
        "machine": {"torch": "0.0", "threads": "2 of 2 cores", "processor": "A processor", "cpu capability": "AVX2"},
        "versions": {"libraries": "a; b"},
        "threads": 2,
        "seed": 0,
        "protocol": {},
        "columns": list(records.Row._fields),
        "cells": [fake_cell(B, M) for B in (64, 4096) for M in (2, 8)],
    }


def test_headline_table(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = workload.Operations(forward=3_000_000_000, backward=1, layer_one=2_000_000_000)
    monkeypatch.setattr(workload, "operations", lambda cell: counted)
    record["cells"] = record["cells"][:1]
    lines = figures.headline_table(record).splitlines()
    split = [[entry.strip("* ") for entry in line.split("|")[1:-1]] for line in lines[2:]]
    rows = {name: entries for name, *entries in split}
    # Ratios 2, 4, 2; 3 GFLOP in 0.2 s; the faster product runs at 20 GFLOP/s.
    assert rows["cpp"] == [
        "200 (140–320)", "200 (140–320)", "2.00 (2.00–3.20)", "2.00 (2.00–3.20)", "15", "75 %", "3", "2e-07",
    ]  # fmt: skip
    assert rows["grouped"][2] == "1.00 (1.00–1.00)"
    assert rows["grouped, compiled"][-1] == "CppCompileError: no compiler"
    assert rows["grouped, compiled"][0] == "–"
    assert "**cpp**" in lines[-2]


def test_machine_table(record: dict[str, Any]) -> None:
    record["cells"][1]["others"]["step"] = 0.034
    table = figures.machine_table(record)
    assert "| processor time of others | at most 3.4 % |" in table
    assert "| commit | unknown |" in table
    assert "| threads | 2 used, 2 of 2 cores |" in table
    record["cells"][0]["others"]["step"] = None
    assert "| processor time of others | not known |" in figures.machine_table(record)


def test_speed_up_table(record: dict[str, Any]) -> None:
    table = figures.speed_up_table(record)
    assert table.count("| B | M = 2 | M = 8 |") == 4
    assert "| 64 | 2.00 (grouped) | 2.00 (grouped) |" in table
    record["cells"] = [cell for cell in record["cells"] if (cell["B"], cell["M"]) != (64, 8)]
    assert "| 64 | 2.00 (grouped) | – |" in figures.speed_up_table(record)


def test_overhead_table(record: dict[str, Any]) -> None:
    table = figures.overhead_table(record)
    assert "| cpp | 200000 | 200000 |" in table
    assert "| grouped, compiled | CppCompileError: no compiler |" in table


def test_screened_out_peers_are_never_the_best_and_keep_their_single_time(record: dict[str, Any]) -> None:
    rows = record["cells"][0]["rows"]
    place = next(i for i, row in enumerate(rows) if (row.contender, row.measured) == ("all_towers", "step"))
    rows[place] = rows[place]._replace(median=1e-9)
    cell = figures.cells(record)[0]
    assert cell.best_peer("float32", "step") == "grouped"
    assert cell.median("all_towers", "step") == 1e-9
    assert cell.speed_up("all_towers", "step") is None


def test_figures_and_page_from_files(record: dict[str, Any], tmp_path: Path) -> None:
    results, page, folder = tmp_path / "results", tmp_path / "page.md", tmp_path / "figures"
    results.mkdir()
    (results / "trunk_grid.json").write_text(json.dumps(record))
    page.write_text("a\n<!-- table:grid -->\nold\n<!-- end -->\nb\n<!-- table:headline -->\n<!-- end -->\n")
    arguments = ["--results", str(results), "--page", str(page), "--figures", str(folder)]
    outcome = CliRunner().invoke(figures.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    text = page.read_text()
    assert "old" not in text
    line = "A processor, AVX2, 2 threads, torch 0.0; `python benchmarks/trunk.py --suite grid`, commit unknown, "
    line += "2020-01-01."
    assert text.startswith(f"a\n<!-- table:grid -->\n\n{line}\n\nForward, cpp\n\n| B |")
    assert "Not measured yet: `python benchmarks/trunk.py --suite headline`" in text
    files = sorted(folder.iterdir())
    of_grid = [name for name, (suite, _) in figures.FIGURES.items() if suite == "grid"]
    assert [file.stem for file in files] == sorted(of_grid)
    assert all("<svg" in file.read_text() for file in files)

    contents = [file.read_bytes() for file in files]
    assert CliRunner().invoke(figures.main, arguments, catch_exceptions=False).exit_code == 0
    assert page.read_text() == text
    assert [file.read_bytes() for file in files] == contents


def test_processors_stand_one_below_the_other(record: dict[str, Any], tmp_path: Path) -> None:
    other = {"instruction_set": "amx", "commit": "0123456789abcdef+changes"}
    for name, each in (("trunk_grid.z.json", record | other), ("trunk_grid.json", record)):
        (tmp_path / name).write_text(json.dumps(each))
    text = figures.render_page("<!-- table:grid -->\n<!-- end -->", tmp_path)
    assert text.index("A processor, AVX2, 2 threads") < text.index("A processor, amx, 2 threads")
    assert "commit 0123456789+changes, 2020-01-01." in text
    assert text.count("Forward, cpp\n") == 2


def test_limits_table(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record["cells"] = record["cells"][:1]
    page = "<!-- table:limits -->\n<!-- end -->"
    (tmp_path / "trunk_headline.json").write_text(json.dumps(record))
    assert "Not measured yet" in figures.render_page(page, tmp_path)

    rates = {"float32 avx2": 80e9, "read": 20e9}
    record["cells"][0] |= {"own_scenarios": 2, "ceilings": rates}
    record["cells"][0]["contenders"][-1]["foreign_dtype"] = "bfloat16"
    asked = []

    def least(*given: Any) -> float:
        asked.append(given[1:])
        return 0.05

    monkeypatch.setattr(ceilings, "least_seconds", least)
    (tmp_path / "trunk_headline.json").write_text(json.dumps(record))
    text = figures.render_page(page, tmp_path)
    # 0.2 s where 0.05 would do; the best peer takes 0.4.
    assert "| 64 | 2 | uniform | cpp | forward | 200 | 50 | 25 % | 8.00 |" in text
    assert "| 64 | 2 | uniform | cpp, foreign bfloat16 | step | 100 | 50 | 50 % | 8.00 |" in text
    assert "Ceilings, all threads together: float32 avx2 80 GFLOP/s; read 20 GB/s." in text
    assert asked[0] == ("forward", "float32", None, 2, rates)
    assert asked[-1] == ("step", "float32", "bfloat16", 2, rates)


def test_unfinished_results_and_unknown_tables_are_refused(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="table 'speed'"):
        figures.render_page("<!-- table:speed --><!-- end -->", tmp_path)
    (tmp_path / "trunk_grid.json").write_text(json.dumps(record | {"complete": False}))
    with pytest.raises(click.ClickException, match="unfinished run"):
        figures.load(tmp_path, "grid")


def test_page_shows_the_results() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    assert figures.render_page(page, results) == page, "run: python benchmarks/figures.py"
    assert set(figures.TABLES) == {part.split(" ")[0] for part in page.split("<!-- table:")[1:]}
    shown = {part.split(")")[0] for part in page.split("](")[1:]}
    assert {f"figures/{name}.svg" for name in figures.FIGURES if name != "front_page"} <= shown
    assert "docs/figures/front_page.svg" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_front_page_and_prose_quote_the_headline() -> None:
    record, *_ = figures.load(ROOT / "benchmarks" / "results", "headline")
    cell = records.cells(record)[0]
    rows = [cell.rows[name, kind] for name in ("cpp", "cpp, foreign bfloat16") for kind in PASSES]
    own_forward, own_step, foreign_forward, foreign_step = (f"{row.public:.1f}×" for row in rows)
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"it is {own_forward} and {own_step}, bfloat16 foreign streams {foreign_forward} and {foreign_step}." in page
    drawn = front_page.figure(record)
    panels = [[text.get_text() for text in panel.texts] for panel in drawn.axes]
    for texts, row, factor in zip(panels, rows[:2], (own_forward, own_step), strict=True):
        assert texts[0].endswith(factor)
        assert texts[1].endswith(f"{row.ratio:.1f}×")
        assert texts[2] == f"{page_tools.digits(row.median * 1e3)} ms"
    assert all("on a CPU" in panel.get_title(loc="left") for panel in drawn.axes)


def test_results_are_summaries() -> None:
    """No file of rounds, whose numbers nobody reads one by one."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert sum(file.stat().st_size for file in files) < 1_000_000
    for file in files:
        assert file.stat().st_size < 100_000, file.name
        if file.stem.startswith(("trunk_", "models")):
            assert records.cells(json.loads(file.read_text(encoding="utf-8")))
