"""benchmarks/gpu.py without a GPU: the dry run, and what is computed from a record."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import gpu
from on_gpu import checks, floors, measuring, plots, roofline, sections, small_cases, summary
from on_gpu.floors import Timed
from on_gpu.measuring import Request
from on_gpu.target import Target, rotating
from workload import Cell

ROOT = Path(__file__).parents[1]
CELL = Cell(4096, 8, 256, 256, (512, 256, 128))


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one dry run, measurements only."""
    folder = tmp_path_factory.mktemp("dry")
    arguments = ["--dry-run", "--out", str(folder), "--no-compiled", "--no-checks"]
    outcome = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return folder


@pytest.fixture
def record(dry: Path) -> dict[str, Any]:
    return json.loads((dry / "gpu.json").read_text(encoding="utf-8"))


def test_dry_run_measures_everything_and_says_what_it_is(dry: Path, record: dict[str, Any]) -> None:
    assert record["dry_run"]
    assert record["complete"]
    assert record["kind"] == "dry run on a CPU: no GPU figure"
    assert {part["status"] for part in record["sections"].values()} == {"done"}
    assert set(record["sections"]) == set(gpu.MEASURED)
    assert "none of these numbers is a GPU's" in summary.text(record)
    drawn = sorted(path.stem for path in dry.glob("*.svg"))
    # There is no device whose memory could be drawn.
    assert drawn == sorted(set(plots.FIGURES) - {"gpu_memory"})
    assert all("dry run on a CPU: no GPU figure" in path.read_text(encoding="utf-8") for path in dry.glob("*.svg"))


def test_dry_run_gates_every_contender(record: dict[str, Any]) -> None:
    cells = [cell for name in ("headline", "grid", "precision") for cell in floors.timed(record, name)]
    assert cells
    for cell in cells:
        assert [entry["gate"]["failure"] for entry in cell.entries.values() if entry["gate"]["failure"]] == []
        assert cell.best_peer("step", "graph")
        (waits,) = [entry for entry in cell.entries.values() if entry["implementation"] == "grouped"]
        assert waits["no_graph"] == "waits for the device: the number of rows of each scenario"
        assert cell.of(waits, "step", "graph") in (cell.median(waits["name"], "step"), None)
    first = cells[0]
    assert set(first.data["passes"]["step"]["seconds"]) >= {"all_towers", "all_towers, graph"}


def test_dry_run_reports_foreign_errors_before_and_after_training(record: dict[str, Any]) -> None:
    part = record["sections"]["foreign"]
    assert part["losses"][1] < part["losses"][0]
    for errors in part["errors"].values():
        assert set(errors) == {"none", "bfloat16", "int8", "float8_e4m3fn"}
        assert errors.pop("none") < 1e-5
        assert all(1e-4 < error < 0.2 for error in errors.values())


def test_floors_of_a_dry_run_are_all_told(record: dict[str, Any]) -> None:
    told = record["floors"]
    assert {floor["holds"] for floor in told} <= {True, False}
    assert any(floor["statement"] == "backward, spread over M" and floor["at_most"] for floor in told)
    assert any(floor["statement"].endswith("foreign int8") for floor in told)


@pytest.mark.parametrize("folder", [ROOT / "docs" / "figures", ROOT / "benchmarks" / "results" / "new"])
def test_dry_run_stays_away_from_measured_figures(folder: Path) -> None:
    outcome = CliRunner().invoke(gpu.main, ["--dry-run", "--out", str(folder)])
    assert outcome.exit_code == 2
    assert "a dry run's are none" in outcome.output
    assert not (folder / "gpu.json").exists()
    assert "needs --out" in CliRunner().invoke(gpu.main, ["--dry-run"]).output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    outcome = CliRunner().invoke(gpu.main, [])
    assert outcome.exit_code == 1
    assert "torch sees no GPU; --dry-run" in outcome.output


def test_no_gpu_figure_without_a_measurement() -> None:
    """docs name a GPU's figures only beside the record they come from."""
    measured = ROOT / "benchmarks" / "results" / "gpu.json"
    figures = sorted((ROOT / "docs" / "figures").glob("gpu_*.svg"))
    if measured.exists():
        assert not json.loads(measured.read_text(encoding="utf-8"))["dry_run"]
        return
    assert figures == []
    assert "not yet measured on a GPU" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_tests_and_sanitized_cases_are_there() -> None:
    job = checks.tests(dry_run=True)
    outcome = checks.finish(checks.start(job), time.monotonic() + 120)
    assert outcome["passed"], outcome["tail"]
    assert "tests collected" in outcome["tail"]
    results = list(small_cases.results("auto", "reference", "cpu", torch.bfloat16))
    assert len(results) > 30
    assert all(tensor.isfinite().all() for tensor in results)
    assert checks.sanitizer("memcheck", "persistent", dry_run=True) is not None


def test_a_job_that_takes_too_long_is_ended() -> None:
    begun = time.monotonic()
    sleeping = checks.Job("sleep", [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"])
    outcome = checks.finish(checks.start(sleeping), begun + 3)
    assert time.monotonic() - begun < 30
    assert (outcome["passed"], outcome["status"], outcome["tail"].strip()) == (False, "out of time", "begun")


DYING = """
import json, sys
request = json.loads(sys.argv[1])
first = request["sections"][0]
parts = {first: {"status": "running" if first == "grid" else "done", "limit_seconds": 9}}
json.dump(parts, open(request["file"], "w"))
sys.exit(5)
"""


def test_a_section_that_kills_its_process_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(request: Request) -> list[str]:
        return [sys.executable, "-c", DYING, json.dumps(request.__dict__)]

    monkeypatch.setattr(Request, "command", command)
    keeper = gpu.Keeper(tmp_path / "gpu.json", {"sections": {}})
    gpu._measure(keeper, ["headline", "grid", "foreign"], time.monotonic() + 30, True, False)
    statuses = {name: part["status"] for name, part in json.loads(keeper.path.read_text())["sections"].items()}
    assert statuses == {"headline": "done", "grid": "failed", "foreign": "done"}


def test_a_failing_section_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: sections.Run, deadline: float, save: sections.Save) -> None:
        save({"cells": [1]})
        raise RuntimeError("misaligned address\nand more")

    monkeypatch.setitem(sections.SECTIONS, "grid", (broken, 1.0))
    threads = torch.get_num_threads()
    try:
        status = measuring.main(Request(str(tmp_path / "parts.json"), ["grid", "ceilings"], 9.0, True, False))
    finally:
        torch.set_num_threads(threads)
    assert status == 1
    part = json.loads((tmp_path / "parts.json").read_text())["grid"]
    assert (part["status"], part["reason"], part["cells"]) == ("failed", "RuntimeError: misaligned address", [1])


def test_sections_share_the_time_that_is_left() -> None:
    everything = list(gpu.MEASURED)
    shares = [measuring.limit(name, everything[index + 1 :], 100.0) for index, name in enumerate(everything)]
    assert shares[-1] == 100.0
    assert sum(measuring.limit(name, [n for n in everything if n != name], 100.0) for name in everything) == (
        pytest.approx(100.0)
    )
    assert max(everything, key=lambda name: sections.SECTIONS[name][1]) == "headline"


def test_bytes_counted_by_hand() -> None:
    # One row, M = 2, D_l = 3, D_g = 5, widths (4, 2), 2 bytes a number.
    moved = roofline.bytes_moved(Cell(1, 2, 3, 5, (4, 2)), 2)
    parameters = 2 * (4 + 1) * 4 + 2 * (3 + 4 + 1) * 4 + 2 * (4 + 2 + 1) * 2 + (5 + 1) * 4 + (4 + 1) * 2
    inputs, outputs, own, streams = 3 + 5, 2 + 2, 2 * (4 + 2) + 2 * 4, 2 * 4
    assert moved.forward == 2 * (inputs + parameters + outputs) + 8
    assert moved.training_forward == moved.forward + 2 * (own + streams)
    assert moved.backward == 2 * (2 * inputs + 2 * parameters + outputs + own + streams) + 8
    assert moved.foreign_streams == 2 * 4


def test_roofs() -> None:
    rates: roofline.Rates = {"bfloat16": 8e14, "int8": 1.6e15, "copy": 3e12, "float8_e4m3fn": None}
    forward = roofline.roof_seconds(CELL, "forward", "bfloat16", 2, None, rates)
    rounded = roofline.roof_seconds(CELL, "forward", "bfloat16", 2, "int8", rates)
    step = roofline.roof_seconds(CELL, "step", "bfloat16", 2, None, rates)
    assert forward is not None
    assert rounded is not None
    assert step is not None
    # Layer 1 of all branches is four fifths of the forward, 7/8 of it foreign.
    assert 0.5 * forward < rounded < 0.7 * forward
    assert step > 1.3 * forward
    assert roofline.roof_seconds(CELL, "forward", "bfloat16", 2, "float8_e4m3fn", rates) is None
    # One row is bound by reading the weights.
    small = Cell(1, 8, 256, 256, (512, 256, 128))
    moved = roofline.bytes_moved(small, 2).forward
    assert roofline.roof_seconds(small, "forward", "bfloat16", 2, None, rates) == pytest.approx(moved / 3e12)


def cell_of(seconds: dict[str, float], B: int = 4096) -> dict[str, Any]:
    def entry(name: str) -> dict[str, Any]:
        implementation = name.split(", ")[0]
        return {
            "name": name,
            "implementation": implementation,
            "peer": implementation != "triton",
            "compiled": False,
            "dtype": "bfloat16",
            "foreign_dtype": "int8" if "int8" in name else None,
            "schedule": "auto",
            "gate": {"failure": None},
            "no_graph": "waits for the device: sizes" if implementation == "grouped" else None,
            "peak_bytes": None,
        }

    names = dict.fromkeys(name.removesuffix(", graph") for name in seconds)
    timed = {"seconds": {name: [value] * 3 for name, value in seconds.items()}, "screened_out": {}}
    return {
        **{"B": B, "M": 8, "local_dim": 256, "global_dim": 256, "hidden_dims": [512, 256, 128]},
        "distribution": "uniform",
        "contenders": [entry(name) for name in names],
        "passes": {"forward": timed, "step": timed},
    }


def test_floors_are_against_the_best_that_a_peer_can_do() -> None:
    seconds = {
        "triton": 3.0,
        "triton, graph": 1.0,
        "triton, int8": 3.0,
        "triton, int8, graph": 0.5,
        "all_towers": 9.0,
        "all_towers, graph": 6.0,
        # It cannot be captured, and counts as it runs.
        "grouped": 1.5,
    }
    record = {"sections": {"headline": {"cells": [cell_of(seconds)]}, "grid": {"cells": [cell_of(seconds, 256)]}}}
    told = {(floor.statement, floor.cell): floor for floor in floors.evaluate(record)}
    graphs = told["forward, graphs", "B=4096 M=8"]
    assert (graphs.measured, graphs.against, graphs.holds) == (1.5, "grouped", True)
    assert told["step, graphs", "B=4096 M=8"].holds is False
    assert told["forward, graphs, foreign int8", "B=4096 M=8"].measured == 3.0
    assert told["step, eager", "B=4096 M=8"].measured == 0.5
    assert told["forward, graphs, against all_towers", "B=4096 M=8"].measured == 6.0
    # Small batches have a floor of their own.
    assert told["forward, graphs, grid", "B=256 M=8"].needed == 2.0
    assert Timed(cell_of({"triton": 1.0})).speed_up("forward", "eager") == (None, "")


def test_backward_spread_takes_off_the_read_of_foreign_streams() -> None:
    cells = [
        {"B": 16384, "M": M, "seconds": [1e-3 + read / 2e12], "foreign_bytes": read}
        for M, read in ((2, 10**8), (8, 7 * 10**8))
    ]
    record = {"sections": {"backward": {"cells": cells}, "ceilings": {"rates": {"copy": 2e12}}}}
    (floor,) = floors.evaluate(record)
    assert floor.measured == pytest.approx(0.0, abs=1e-9)
    assert floor.holds
    (unknown,) = floors.evaluate({"sections": {"backward": {"cells": cells}}})
    assert unknown.holds is None


def test_rotating_calls() -> None:
    seen: list[int] = []
    call = rotating([lambda index=index: seen.append(index) for index in range(3)])
    for _ in range(4):
        call()
    assert sorted(seen[:3]) == [0, 1, 2]
    assert seen[3] == seen[0]


def test_target_of_a_dry_run() -> None:
    target = Target(dry_run=True)
    assert target.unavailable() is None
    assert target.device == "cpu"
    assert "not a GPU" in target.facts()["name"]
    assert target.peak_bytes(lambda: None) is None
