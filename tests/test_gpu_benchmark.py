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
import records
from cells import GRAPH, rotating
from contenders import Contender
from on_gpu import checks, floors, measuring, plots, roofline, sections, small_cases, summary
from on_gpu.measuring import Request
from on_gpu.target import Target
from saml_kernels.testing.problem import PASSES
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
    assert drawn == sorted(set(plots.FIGURES) - {"gpu_memory", "gpu_stages"})
    assert "only the kernels have stages" in record["sections"]["stages"]["reason"]
    assert not list(dry.glob("gpu.*.json"))
    assert all("dry run on a CPU: no GPU figure" in path.read_text(encoding="utf-8") for path in dry.glob("*.svg"))


def test_dry_run_gates_every_contender(record: dict[str, Any]) -> None:
    cells = [cell for name in ("headline", "grid", "precision") for cell in floors.timed(record, name)]
    assert cells
    for cell in cells:
        assert [entry["failure"] for entry in cell.contenders.values() if "failure" in entry] == []
        assert floors.best_peer(cell, "step", GRAPH)
        (waits,) = [entry for name, entry in cell.contenders.items() if name.split(", ")[0] == "grouped"]
        assert waits["no_graph"] == "waits for the device: the number of rows of each scenario"
    assert cells[0].timed("all_towers", "step")
    assert cells[0].timed("all_towers" + GRAPH, "step")


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
import json, os, subprocess, sys, time
request = json.loads(sys.argv[1])
part = {"status": "done" if request["section"] == "headline" else "running", "cells": [1]}
json.dump(part, open(request["file"], "w"))
if request["section"] == "grid":
    os.abort()
if request["section"] == "backward":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def dying_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is done, one that crashes, one that hangs with a child process, one whose process ends too early."""
    monkeypatch.setattr(Request, "command", lambda self: [sys.executable, "-c", DYING, json.dumps(self.__dict__)])
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)


def test_a_section_that_crashes_or_hangs_leaves_the_others(tmp_path: Path, dying_sections: None) -> None:
    keeper = gpu.Keeper(tmp_path / "gpu.json", {"checks": {}, "sections": {}})
    begun = time.monotonic()
    gpu._measure(keeper, ["headline", "grid", "backward", "foreign"], begun + 30, True, False)
    assert time.monotonic() - begun < 60
    parts = json.loads(keeper.path.read_text())["sections"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "headline": "done", "grid": "failed", "backward": "out of time", "foreign": "failed",
    }  # fmt: skip
    # What each had found before is kept.
    assert all(part["cells"] == [1] for part in parts.values())
    assert "ended with -6" in parts["grid"]["reason"]
    assert _ended(int(parts["backward"]["reason"].split(": ")[1]))
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def _ended(pid: int) -> bool:
    """Gone, or a zombie that waits for its new parent."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_no_job_outlives_the_command() -> None:
    program = (
        "import sys, time; from on_gpu import checks; "
        "print(checks.start(checks.Job('sleep', [sys.executable, '-c', 'import time; time.sleep(600)'])).process.pid)"
    )
    outcome = checks.finish(checks.start(checks.Job("start", [sys.executable, "-c", program])), time.monotonic() + 60)
    assert outcome["passed"], outcome["tail"]
    assert _ended(int(outcome["tail"]))


def test_the_exit_status_tells_of_failed_sections(
    tmp_path: Path, dying_sections: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path), "--no-checks", "--budget", "20", "--sections", "headline,grid"]
    monkeypatch.setattr(gpu.summary, "text", lambda record: "\n".join(summary.failures(record)))
    monkeypatch.setattr(gpu.plots, "save", lambda record, folder: [])
    outcome = CliRunner().invoke(gpu.main, arguments)
    assert outcome.exit_code == 1
    assert "section grid: failed" in outcome.output
    assert "section headline" not in outcome.output
    assert json.loads((tmp_path / "gpu.json").read_text())["complete"] is False


def test_a_section_without_time_is_not_begun(tmp_path: Path, dying_sections: None) -> None:
    keeper = gpu.Keeper(tmp_path / "gpu.json", {"checks": {}, "sections": {}})
    gpu._measure(keeper, ["grid"], time.monotonic(), True, False)
    assert keeper.record["sections"] == {"grid": {"status": "not begun", "reason": "no time was left"}}
    assert summary.failures({**keeper.record, "dry_run": True}) == ["section grid: not begun"]


def test_a_record_of_the_same_code_and_machine_is_continued(tmp_path: Path) -> None:
    head = {"dry_run": True, "commit": "a", "device": {}, "versions": {}, "checks": {}, "sections": {}}
    first = gpu.Keeper(tmp_path / "gpu.json", head | {"sections": {"grid": {"status": "done"}}})
    first.save()
    same, other, unknown = (gpu.Keeper(first.path, head | change) for change in ({}, {"commit": "b"}, {"commit": None}))
    same.go_on()
    assert same.record["sections"] == {"grid": {"status": "done"}}
    for keeper in (other, unknown):
        first.save()
        keeper.go_on()
        assert json.loads(first.path.read_text())["sections"] == {}


def test_a_failing_section_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: sections.Run, deadline: float, save: sections.Save) -> None:
        save({"cells": [1]})
        raise RuntimeError("misaligned address\nand more")

    monkeypatch.setitem(sections.SECTIONS, "grid", (broken, 1.0))
    threads = torch.get_num_threads()
    try:
        status = measuring.main(Request(str(tmp_path / "part.json"), "grid", 9.0, True, False))
    finally:
        torch.set_num_threads(threads)
    assert status == 1
    part = json.loads((tmp_path / "part.json").read_text())
    assert (part["status"], part["reason"], part["cells"]) == ("failed", "RuntimeError: misaligned address", [1])


def test_sections_share_the_time_that_is_left() -> None:
    everything = list(gpu.MEASURED)
    shares = [gpu.share(name, everything[index + 1 :], 100.0) for index, name in enumerate(everything)]
    assert shares[-1] == 100.0
    assert sum(gpu.share(name, [n for n in everything if n != name], 100.0) for name in everything) == (
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
        found: dict[str, Any] = {"name": name, "peer": not name.startswith("triton"), "dtype": "bfloat16"}
        found |= {"foreign_dtype": "int8"} if "int8" in name else {}
        return found | ({"no_graph": "waits for the device: sizes"} if name == "grouped" else {})

    names = dict.fromkeys(name.removesuffix(GRAPH) for name in seconds)
    modes = {name: GRAPH if name.endswith(GRAPH) else "" for name in seconds}
    peers = {"": ["all_towers", "grouped"], GRAPH: ["all_towers" + GRAPH, "grouped"]}
    rounds = {name: [value] * 3 for name, value in seconds.items()}
    rows = [row for kind in PASSES for row in records.rows(kind, rounds, {n: peers[m] for n, m in modes.items()})]
    return {
        **{"B": B, "M": 8, "local_dim": 256, "global_dim": 256, "hidden_dims": [512, 256, 128]},
        **{"distribution": "uniform", "contenders": [entry(name) for name in names], "rows": rows},
    }


def section(*cells: dict[str, Any]) -> dict[str, Any]:
    return {"columns": list(records.Row._fields), "cells": list(cells)}


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
    record = {"sections": {"headline": section(cell_of(seconds)), "grid": section(cell_of(seconds, 256))}}
    told = {(floor.statement, floor.cell): floor for floor in floors.evaluate(record)}
    graphs = told["forward, graphs", "B=4096 M=8"]
    assert (graphs.measured, graphs.against, graphs.holds) == (1.5, "grouped", True)
    assert told["step, graphs", "B=4096 M=8"].holds is False
    assert told["forward, graphs, foreign int8", "B=4096 M=8"].measured == 3.0
    assert told["step, eager", "B=4096 M=8"].measured == 0.5
    assert told["forward, graphs, against all_towers", "B=4096 M=8"].measured == 6.0
    # Small batches have a floor of their own.
    assert told["forward, graphs, grid", "B=256 M=8"].needed == 2.0
    alone = {"sections": {"headline": section(cell_of({"triton": 1.0}))}}
    assert {floor.measured for floor in floors.evaluate(alone)} == {None}


def test_backward_spread_takes_off_the_read_of_foreign_streams() -> None:
    cells = [
        {"B": 16384, "M": M, "median": 1e-3 + read / 2e12, "foreign_bytes": read}
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
    assert target.peak_bytes(Contender("grouped"), CELL, lambda: ()) == {}
