"""benchmarks/gpu.py without a GPU: the dry run, and what is computed from a record."""

from __future__ import annotations

import fcntl
import json
import os
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
from on_gpu import (
    catalogue,
    checks,
    floors,
    guard,
    launch_times,
    measuring,
    plots,
    processes,
    roofline,
    small_cases,
    smoke,
    summary,
    trials,
    tune,
)
from on_gpu.recording import Product
from on_gpu.request import Request
from on_gpu.run import Run, Save
from on_gpu.target import Target
from saml_kernels.backends.triton import configs
from saml_kernels.testing.problem import PASSES
from workload import Cell

ROOT = Path(__file__).parents[1]
CELL = Cell(4096, 8, 256, 256, (512, 256, 128))
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one dry run of every section."""
    # Workers of pytest-xdist share it.
    shared = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp() / ("../dry" if shared else "dry")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "gpu.json").exists():
            run_dry(folder)
    return folder


def run_dry(folder: Path) -> None:
    arguments = ["--dry-run", "--out", str(folder), "--no-compiled", "--sections", ",".join(catalogue.SECTIONS)]
    outcome = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output


@pytest.fixture
def record(dry: Path) -> dict[str, Any]:
    return json.loads((dry / "gpu.json").read_text(encoding="utf-8"))


def test_dry_run_goes_through_everything_and_says_what_it_is(dry: Path, record: dict[str, Any]) -> None:
    assert record["dry_run"]
    assert record["complete"]
    assert record["kind"] == "dry run on a CPU: no GPU figure"
    assert {part["status"] for part in record["sections"].values()} == {"done"}
    assert set(record["sections"]) == set(catalogue.SECTIONS)
    assert "none of these numbers is a GPU's" in summary.text(record)
    drawn = sorted(path.stem for path in dry.glob("*.svg"))
    # There is no device whose memory could be drawn.
    assert drawn == sorted(set(plots.FIGURES) - {"gpu_memory", "gpu_stages"})
    assert "only the kernels have stages" in record["sections"]["stages"]["reason"]
    assert all((dry / f"gpu.{name}.json").exists() for name in catalogue.SECTIONS)
    assert all("dry run on a CPU: no GPU figure" in path.read_text(encoding="utf-8") for path in dry.glob("*.svg"))


def test_dry_run_checks_by_name(dry: Path, record: dict[str, Any]) -> None:
    results = {name: record["sections"][name]["results"] for name in catalogue.CHECKS}
    assert [result["name"] for result in results["smoke"]] == [
        "auto, bfloat16, foreign int8",
        "2,000 training steps at 1, 2, 132, 264 programs in turn",
    ]
    assert {result["status"] for name in ("smoke", "sanitize") for result in results[name]} == {"passed"}
    assert len(results["tests"]) > 80
    if not torch.cuda.is_available():
        assert {result["reason"] for result in results["tests"]} == {"needs a CUDA GPU"}
    for name in ("gpu.tests.log", "gpu.tests.xml", "gpu.tests.jsonl", "gpu.sanitize.memcheck.one_unit.auto.log"):
        assert (dry / name).stat().st_size > 0


def test_dry_run_times_launches_and_tunes(dry: Path, record: dict[str, Any]) -> None:
    timed, tuned = record["sections"]["launches_timed"], record["sections"]["tune"]
    assert [(cell["M"], cell["schedule"]) for cell in timed["cells"]] == [
        (M, schedule) for M in (2, 3) for schedule in configs.SCHEDULES
    ]
    assert all(row["median"] > 0 for cell in timed["cells"] for row in cell["launches"])
    (variation,) = timed["variations"]
    assert (variation["axis"], variation["value"], variation["built_in"]) == ("block_n", 128, 64)
    choices = configs.tuned(dry / tune.FILE)
    assert [shape["key"] for shape in tuned["shapes"]] == list(choices)
    assert "persistent, forward, block_n 128" in summary.text(record)


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


def test_every_sanitized_case_runs() -> None:
    for name in small_cases.names(Target(dry_run=True)):
        results = list(small_cases.results(name, "reference", "cpu", torch.bfloat16))
        assert len(results) > 10
        assert all(tensor.isfinite().all() for tensor in results)


def test_every_run_of_a_sanitizer_has_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sanitizer that finds something with one of its tools, and without one."""
    found: dict[str, Any] = {}
    run = Run(Target(dry_run=False), False, folder=tmp_path)
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "$@"\n[ "$2" = memcheck ] || exit "$4"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    checks.sanitize(run, time.monotonic() + 60, found.update)
    statuses = {result["name"]: result["status"] for result in found["results"]}
    cases = small_cases.names(run.target)
    assert cases == [
        "one unit, persistent",
        "one unit, per_layer",
        "two units, persistent",
        "two units, per_layer",
        "foreign int8, auto",
    ]
    assert statuses == {f"memcheck, {case}": "passed" for case in cases} | {f"racecheck, {c}": "failed" for c in cases}
    assert "ended with 86" in found["results"][-1]["reason"]
    log = tmp_path / "gpu.sanitize.memcheck.one_unit.per_layer.log"
    assert "small_cases.py one unit, per_layer" in log.read_text()
    checks.sanitize(run, time.monotonic() - 1, found.update)
    assert {result["status"] for result in found["results"]} == {"left out"}
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    checks.sanitize(run, time.monotonic() + 60, found.update)
    assert {result["reason"] for result in found["results"]} == {"compute-sanitizer is not installed"}


def test_commands_of_the_first_day() -> None:
    assert gpu.chosen("check", None) == ["smoke", "tests", "sanitize"]
    assert gpu.chosen("tune", None) == ["launches_timed", "tune"]
    assert gpu.chosen("measure", None)[:2] == ["ceilings", "headline"]
    # Each section belongs to one of them, and is run in their order, however it is asked for.
    assert [name for command in catalogue.COMMANDS for name in gpu.chosen(command, None)] == list(catalogue.SECTIONS)
    assert gpu.chosen(None, "grid,smoke") == ["smoke", "grid"]
    assert gpu.chosen(None, None) == [*catalogue.CHECKS, *catalogue.MEASURED]
    for options, error in (
        (["--sections", "smoke,fog"], "there is no fog"),
        (["--sections", "smoke", "--command", "check"], "give one of"),
    ):
        outcome = CliRunner().invoke(gpu.main, ["--dry-run", "--out", "unused", *options])
        assert outcome.exit_code == 2
        assert error in outcome.output
    assert not Path("unused").exists()


def test_checks_get_most_of_the_first_command_and_run_together() -> None:
    assert gpu.batches(gpu.chosen("check", None)) == [("smoke",), ("tests", "sanitize")]
    assert gpu.batches(["sanitize", "ceilings", "grid"]) == [("sanitize",), ("ceilings",), ("grid",)]
    left = (1 - gpu.BUILD_SHARE) * gpu.TOTAL_SECONDS
    smoke_seconds = gpu.share(gpu.batches(gpu.chosen("check", None)), left)
    assert left - smoke_seconds > gpu.TOTAL_SECONDS / 2


def test_waits_are_bounded_in_checks_and_choices_are_given(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    run = gpu.Sections(gpu.Keeper(file, {}), tmp_path, True, False, gpu.choices(None, tmp_path), 100.0)
    assert not run.tuned.exists()
    for name in catalogue.SECTIONS:
        told = run.environment(name)
        assert told["SAML_KERNELS_DEBUG_WAITS"] == ("20000000" if name in catalogue.CHECKS else None)
        assert told["SAML_KERNELS_TUNED"] == str(run.tuned)
    assert "SAML_KERNELS_DEBUG_WAITS" not in processes.environment({"SAML_KERNELS_DEBUG_WAITS": None})
    file.write_text("{}")
    assert gpu.choices(file, tmp_path) == file.resolve()
    configs.forget()
    file.write_text("[1]")
    outcome = CliRunner().invoke(gpu.main, ["--dry-run", "--out", str(tmp_path / "out"), "--tuned", str(file)])
    configs.forget()
    assert outcome.exit_code == 2
    assert "does not hold tuned choices" in outcome.output.replace("\n", " ")


def test_smoke_knows_every_form_by_name() -> None:
    class Kernels(Target):
        schedules = ("persistent", "per_layer")

    names = [form.name for form in smoke.forms(Kernels(dry_run=False))]
    assert names[:2] == ["persistent, float32", "per_layer, float32"]
    assert "auto, bfloat16, foreign float8_e4m3fn" in names
    assert [name for name in names if "programs" in name] == [
        f"persistent, bfloat16, {programs} programs" for programs in (1, 2, 132, 264)
    ]
    assert len(names) == len(set(names)) == 13


def test_smoke_tells_wrong_numbers_and_changing_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    target, found = Target(dry_run=True), {}
    wrong = smoke.Form("float32")
    assert smoke._failure(target, wrong, smoke.DRY) is None
    original = smoke.backend

    def off(name: str, **options: Any) -> Any:
        return lambda problem: (original(name, **options)(problem).own * 1.01, original(name)(problem).aux)

    monkeypatch.setattr(smoke, "backend", off)
    assert "wrong: relative error of" in str(smoke._failure(target, wrong, smoke.DRY))
    factors = iter([1.0] * 9 + [1.001] * 9)

    def moving(name: str, **options: Any) -> Any:
        return lambda problem: (original(name)(problem).own * next(factors), original(name)(problem).aux)

    monkeypatch.setattr(smoke, "backend", moving)
    smoke.repeated(Run(target, False), time.monotonic() + 60, found.update)
    assert found["failure"] is None
    factors = iter([1.0] * 5 + [1.001] * 9)
    smoke.repeated(Run(target, False), time.monotonic() + 60, found.update)
    assert found["failure"].startswith("step 5 with 2 programs gave other bits: ")


def test_axes_are_varied_one_at_a_time() -> None:
    built_in = configs.built_in(configs.Bucket.of(4096, 8, 512), 2)
    found = list(launch_times.variations(built_in, launch_times.AXES))
    assert len({variation.name for variation in found}) == len(found)
    for variation in found:
        part = getattr(variation.choice, variation.part)
        usual = getattr(built_in, variation.part)
        differing = [name for name in part.__dict__ if getattr(part, name) != getattr(usual, name)]
        assert differing == [variation.axis]
        assert trials.choice_of(json.loads(json.dumps(records.asdict(variation.choice)))) == variation.choice
    assert {variation.axis for variation in found if variation.part == "weights"} == set(launch_times.OF_PRODUCTS)
    assert {variation.choice.schedule for variation in found if variation.part == "forward"} == set(configs.SCHEDULES)


def test_choices_that_may_break_the_device_are_not_tuned() -> None:
    assert not trials.harms(None)
    assert not trials.harms("wrong: relative error of own is 1")
    assert not trials.harms("OutOfResources: out of resource: shared memory")
    assert all(map(trials.harms, ("out of time", "left out", "RuntimeError: CUDA error: an illegal memory access")))


def test_a_candidate_that_hangs_is_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Run(Target(dry_run=True), False, folder=tmp_path), []
    hanging, *others = configs.candidates("forward", 4)
    wrong = others[0]
    tried = {name: None for config in others for name in tune._trials(run, 2, "forward", config)}
    tried |= dict.fromkeys(list(tune._trials(run, 2, "forward", hanging))[1:], "out of time")
    tried |= dict.fromkeys(tune._trials(run, 2, "forward", wrong), "wrong: relative error of own is 1")

    def refuse(*arguments: object) -> None:
        seen.extend(configs.candidates("forward", 4, "sm_90"))
        raise tune.TuningFailed("no candidate")

    monkeypatch.setattr(tune.tuning, "tune", refuse)
    assert tune._tuned(run, 24, 2, tried, tmp_path / "tuned.json")["failure"] == "TuningFailed: no candidate"
    assert seen == others
    names = {name for config in configs.candidates("forward", 2) for name in tune._trials(run, 8, "forward", config)}
    assert len(names) == 2 * len(configs.candidates("forward", 2))


def test_products_are_torchs_own() -> None:
    assert Product(3, 4, 5).operations == 2 * 3 * 4 * 5
    assert Product(3, 4, 5).call(torch.float32, "cpu")().shape == (3, 5)
    assert Product(3, 4, 5, 2).operations == 2 * Product(3, 4, 5).operations
    assert Product(3, 4, 5, 2).call(torch.bfloat16, "cpu")().shape == (2, 3, 5)


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


def sections_in(folder: Path) -> gpu.Sections:
    """What runs sections, with a record in a folder."""
    keeper = gpu.Keeper(folder / "gpu.json", {"checks": {}, "sections": {}})
    return gpu.Sections(keeper, folder, True, False, folder / "no-choices.json", 10.0)


@pytest.fixture
def dying_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is done, one that crashes, one that hangs with a child process, one whose process ends too early."""
    monkeypatch.setattr(Request, "command", lambda self: [sys.executable, "-c", DYING, json.dumps(self.__dict__)])
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu, "batches", lambda wanted, together=False, original=gpu.batches: original(wanted))


def test_a_section_that_crashes_or_hangs_leaves_the_others(tmp_path: Path, dying_sections: None) -> None:
    run = sections_in(tmp_path)
    begun = time.monotonic()
    run.all(["headline", "grid", "backward", "foreign"], begun + 10)
    assert time.monotonic() - begun < 30
    parts = json.loads(run.keeper.path.read_text())["sections"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "headline": "done",
        "grid": "failed",
        "backward": "out of time",
        "foreign": "failed",
    }
    # What each had found before is kept.
    assert all(part["cells"] == [1] for part in parts.values())
    assert "ended with -6" in parts["grid"]["reason"]
    assert not Path("/proc", parts["backward"]["reason"].split(": ")[1].strip()).exists()
    files = ["backward", "foreign", "grid", "headline"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["gpu.json", *(f"gpu.{f}.json" for f in files)])


@LINUX
def test_what_was_found_is_kept_when_the_command_is_told_to_end(
    tmp_path: Path, dying_sections: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = sections_in(tmp_path), tmp_path / "gpu.backward.json"
    before = guard.descendants(os.getpid())

    def ended_by_a_signal(job: object, deadline: float) -> None:
        while time.monotonic() < deadline and not (file.exists() and file.read_text().endswith("}")):
            time.sleep(0.1)
        sys.exit(143)

    monkeypatch.setattr(processes, "finish", ended_by_a_signal)
    with pytest.raises(SystemExit):
        run.all(["backward"], time.monotonic() + 100)
    part = json.loads(run.keeper.path.read_text())["sections"]["backward"]
    assert (part["status"], part["cells"]) == ("failed", [1])
    assert "SystemExit" in part["reason"]
    assert set(guard.descendants(os.getpid())) <= set(before)


def test_the_exit_status_tells_of_failed_sections(
    tmp_path: Path, dying_sections: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--dry-run", "--out", str(tmp_path), "--budget", "20", "--sections", "headline,grid"]
    monkeypatch.setattr(gpu.summary, "text", lambda record: "\n".join(summary.failures(record)))
    monkeypatch.setattr(gpu.plots, "save", lambda record, folder: [])
    outcome = CliRunner().invoke(gpu.main, arguments)
    assert outcome.exit_code == 1
    assert "section grid: failed" in outcome.output
    assert "section headline" not in outcome.output
    assert json.loads((tmp_path / "gpu.json").read_text())["complete"] is False


def test_a_section_without_time_is_not_begun(tmp_path: Path, dying_sections: None) -> None:
    run = sections_in(tmp_path)
    run.all(["grid"], time.monotonic())
    assert run.keeper.record["sections"] == {"grid": {"status": "not begun", "reason": "no time was left"}}
    assert summary.failures({**run.keeper.record, "dry_run": True}) == ["section grid: not begun"]


@pytest.mark.parametrize(
    ("section", "first"),
    [("headline", "B=48 M=3"), ("grid", "B=24 M=2"), ("backward", "M=2"), ("launches", "auto B=16 M=2 L=2")],
)
def test_what_there_was_no_time_for_is_left_out_by_name(section: str, first: str, record: dict[str, Any]) -> None:
    found: dict[str, Any] = {}
    catalogue.function(section)(Run(Target(dry_run=True), False), time.monotonic() - 1, found.update)
    assert found["left_out"][0] == first
    part = {"status": "cut short", **found}
    assert f"left out: {first}" in summary.text(record | {"sections": {section: part}, "floors": []})


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
    def broken(run: Run, deadline: float, save: Save) -> None:
        save({"cells": [1]})
        raise RuntimeError("misaligned address\nand more")

    monkeypatch.setitem(catalogue.SECTIONS, "grid", catalogue.Section(broken, 1.0))
    threads = torch.get_num_threads()
    try:
        status = measuring.main(Request(str(tmp_path / "part.json"), "grid", 9.0, True, False))
    finally:
        torch.set_num_threads(threads)
    assert status == 1
    part = json.loads((tmp_path / "part.json").read_text())
    assert (part["status"], part["reason"], part["cells"]) == ("failed", "RuntimeError: misaligned address", [1])


def test_sections_share_the_time_that_is_left() -> None:
    everything = gpu.batches(catalogue.MEASURED)
    shares = [gpu.share(everything[index:], 100.0) for index in range(len(everything))]
    assert shares[-1] == 100.0
    assert sum(gpu.share([batch, *(b for b in everything if b != batch)], 100.0) for batch in everything) == (
        pytest.approx(100.0)
    )
    assert max(catalogue.MEASURED, key=lambda name: catalogue.SECTIONS[name].weight) == "headline"


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
