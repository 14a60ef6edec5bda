"""The benchmarks' own tools: peers, gate, operation count, timing protocol, tables and figures."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import contenders
import figures
import memory
import models
import timing
import trunk
import workload
from contenders import CPP_LOW_PRECISION, EAGER_PEERS, LOW_PRECISION_PEERS, REFERENCE, Contender
from gate import Gate, evaluate, relative_errors
from peers import PEERS
from peers.permutation import _TakeRows
from workload import Cell

ROOT = Path(__file__).parents[1]
TINY = Cell(B=37, M=3, local_dim=5, global_dim=6, hidden_dims=(7, 4))
# The peer whose products are oneDNN's has no float64.
FLOAT64_PEERS = [name for name in PEERS if name not in ("grouped_onednn", "grouped_mm")]


@pytest.mark.parametrize("name", FLOAT64_PEERS)
@pytest.mark.parametrize(
    "cell",
    [
        TINY,
        Cell(64, 5, 8, 3, (6,)),
        Cell(40, 4, 6, 6, (8, 5, 3), "zipf"),
        Cell(1, 2, 8, 8, (8,)),
        Cell(3, 8, 4, 4, (5, 4)),  # scenarios without a row
    ],
    ids=str,
)
def test_peers_compute_the_reference_in_float64(name: str, cell: Cell) -> None:
    problem = workload.make(cell)
    errors = relative_errors(evaluate(PEERS[name].function, problem.to(torch.float64)), workload.reference(problem))
    assert max(errors.values()) < 1e-12, errors


# torch._grouped_mm has no float64, and widths are multiples of 16 bytes. The second cell has scenarios without a row.
@pytest.mark.parametrize(
    "cell", [Cell(37, 3, 8, 4, (12, 4)), Cell(3, 8, 4, 4, (8, 4)), Cell(40, 4, 4, 8, (8, 12, 4), "zipf")], ids=str
)
def test_grouped_mm_computes_the_reference(cell: Cell) -> None:
    contender = Contender("grouped_mm")
    verdict = Gate(workload.make(cell)).judge(contender, contender.function())
    assert verdict.failure is None


def test_rows_taken_both_ways_have_the_gradient_of_indexing() -> None:
    x, permutation = torch.randn(9, 4, requires_grad=True), torch.randperm(9)
    weights = torch.randn(9, 4)
    taken = _TakeRows.apply(x, permutation, permutation.argsort())
    assert torch.equal(taken, x[permutation])
    ((gradient,), (expected,)) = (torch.autograd.grad((y * weights).sum(), x) for y in (taken, x[permutation]))
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("contender", [*EAGER_PEERS, REFERENCE], ids=lambda contender: contender.name)
@pytest.mark.parametrize("cell", [TINY, Cell(3, 8, 4, 4, (5, 4))], ids=str)
def test_gate_passes_float32(cell: Cell, contender: Contender) -> None:
    verdict = Gate(workload.make(cell)).judge(contender, contender.function())
    assert verdict.failure is None
    # own and aux twice, two inputs, 2 · (weights and biases of branches and auxiliary network), gate and its bias
    assert len(verdict.errors) == 4 + 2 + 2 * 4 + 2
    assert set(verdict.bounds.values()) == {1e-5}


def test_gate_bounds_low_precision_by_the_plain_formulation() -> None:
    contender = LOW_PRECISION_PEERS[0]
    verdict = Gate(workload.make(Cell(512, 4, 32, 32, (32, 16)))).judge(contender, contender.function())
    assert verdict.failure is None
    assert 1e-3 < verdict.bounds["own"] < 2e-2


def test_gate_reports_the_distance_of_rounded_foreign_streams() -> None:
    contender = Contender("reference", foreign_dtype=torch.bfloat16)
    verdict = Gate(workload.make(TINY)).judge(contender, contender.function())
    assert verdict.failure is None
    assert verdict.distance is not None
    assert 1e-5 < verdict.distance < 1e-2


def _scaled(own: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    return own * 1.0001, aux


def _leaking(own: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    return own + 0.001 * (own - own.detach()), aux


@pytest.mark.parametrize("change", [_scaled, _leaking])
def test_gate_stops_wrong_outputs_and_wrong_gradients(change: Callable[..., Any]) -> None:
    def function(*arguments: Any) -> tuple[Tensor, Tensor]:
        return change(*PEERS["grouped"].function(*arguments))

    verdict = Gate(workload.make(TINY)).judge(Contender("grouped"), function)
    assert verdict.failure is not None
    assert verdict.failure.startswith("wrong: relative error of ")


def test_gate_records_why_a_contender_does_not_run() -> None:
    def function(*arguments: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("cannot compile\nlong trace")

    assert Gate(workload.make(TINY)).judge(Contender("grouped"), function).failure == "RuntimeError: cannot compile"


def test_chunks_of_the_reference_agree_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = workload.make(TINY)
    whole = workload.reference(problem)
    monkeypatch.setattr(workload, "REFERENCE_ROWS", 5)
    assert max(relative_errors(workload.reference(problem), whole).values()) < 1e-13


def test_no_row_lies_near_a_kink() -> None:
    cell = Cell(2000, 3, 16, 16, (32, 16))
    before = workload.relu_margin(workload.make(cell, avoid_kinks=False))
    after = workload.relu_margin(workload.make(cell))
    assert before.min() < workload.KINK_MARGIN <= after.min()
    # The margin is that of the inputs of the very relus whose gradient is taken.
    assert float(after.max()) < 1.0


def test_operations_of_a_trunk_counted_by_hand() -> None:
    # One row, M = 2, D_l = 3, D_g = 5, widths (4, 2).
    auxiliary = 2 * 5 * 4 + 2 * 4 * 2
    layer_one = 2 * (2 * (3 + 4) * 4)
    gate = 2 * 4 * 4
    scores = 2 * 4 + 2 * (2 * 4) + 2 * 4  # one c_tj, two norms, one term of the mix
    tail = 2 * (4 + 2) * 2
    own_products = auxiliary + layer_one // 2 + gate + tail
    operations = workload.operations(Cell(1, 2, 3, 5, (4, 2)))
    assert operations.layer_one == layer_one
    assert operations.forward == auxiliary + layer_one + gate + scores + tail
    assert operations.backward == 2 * own_products + 2 * 4 + 2 * 4  # p_j; dc_j V_j
    assert operations.step == operations.forward + operations.backward
    assert workload.operations(Cell(7, 2, 3, 5, (4, 2))).step == 7 * operations.step


def test_products_have_the_size_of_layer_one() -> None:
    for product in contenders.products({torch.float32, torch.bfloat16}):
        result = product.call(TINY)()
        assert isinstance(result, Tensor)
        assert result.shape == (TINY.B, TINY.M * 7)
        assert result.dtype == product.dtype


@pytest.mark.parametrize("arguments", [{"M": 1}, {"B": 0}, {"distribution": "normal"}])
def test_cells_refuse_what_is_not_timed(arguments: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"B": 4, "M": 2, "local_dim": 2, "global_dim": 2, "hidden_dims": (2,)}
    with pytest.raises(ValueError, match=r"^(a cell needs|distribution must be)"):
        Cell(**fields | arguments)


def test_every_contender_takes_every_place() -> None:
    names = ["a", "b", "c", "d"]
    orders = [timing.order(names, index) for index in range(8)]
    for place in range(4):
        assert {order[place] for order in orders} == set(names)
    assert orders[:3] == [["a", "b", "c", "d"], ["d", "c", "b", "a"], ["b", "c", "d", "a"]]


def test_rounds_respect_bounds_and_budget() -> None:
    calls = {"short": lambda: None, "longer": lambda: sum(range(1000))}
    few = timing.interleave(calls, timing.Protocol(budget=1e-9, min_rounds=3, max_rounds=9, min_sample=1e-5))
    many = timing.interleave(calls, timing.Protocol(budget=60, min_rounds=3, max_rounds=9, min_sample=1e-5))
    assert {name: len(seconds) for name, seconds in few.items()} == {"short": 3, "longer": 3}
    assert {len(seconds) for seconds in many.values()} == {9}
    assert all(value > 0 for seconds in many.values() for value in seconds)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc/stat")
def test_processor_time_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Busy, own, all: 8 of 20 seconds busy, 5 of them ours.
    readings = iter([(100.0, 1.0, 1000.0), (108.0, 6.0, 1020.0)])
    monkeypatch.setattr(timing, "_processor_seconds", lambda: next(readings))
    with timing.Others() as others:
        pass
    assert others.share == pytest.approx(3 / 20)
    monkeypatch.undo()
    busy, own, total = timing._processor_seconds() or (0.0, 0.0, 0.0)
    assert 0 < own < busy < total


def test_ratios_are_formed_round_by_round() -> None:
    # The second round was disturbed for both: the ratio of medians would be 5.
    ratio = timing.ratio([2.0, 20.0, 10.0], [1.0, 10.0, 2.0])
    assert ratio.median == 2.0
    assert ratio.p20 == 2.0
    assert ratio.p80 == pytest.approx(3.8)
    assert ratio.rounds == 3


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_peak_memory_counts_what_a_step_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    mebibytes = 64

    def step(*_: Any) -> Callable[[], object]:
        return lambda: torch.ones(mebibytes * 2**20, dtype=torch.int8).numel()

    monkeypatch.setattr(memory, "step_call", step)
    threads = torch.get_num_threads()
    measured = memory.measure(memory.request(Contender("grouped"), TINY, seed=0, threads=threads))
    assert measured == pytest.approx(mebibytes * 2**20, rel=0.1)


def test_requests_survive_json() -> None:
    asked = json.loads(memory.request(CPP_LOW_PRECISION, TINY, seed=3, threads=2))
    assert asked["contender"]["dtype"] == "bfloat16"
    assert asked["contender"]["foreign_dtype"] is None
    assert asked["cell"]["hidden_dims"] == [7, 4]


# One cell as trunk.py writes it, the rounds made up: `grouped` is the best peer, all_towers was screened out.
def fake_cell(B: int, M: int) -> dict[str, Any]:
    def contender(name: str, peer: bool, failure: str | None = None, peak: int | None = 3 * 2**20) -> dict[str, Any]:
        implementation, *rest = name.split(", ")
        return {
            "name": name,
            "implementation": implementation,
            "peer": peer,
            "compiled": "compiled" in rest,
            "dtype": "float32",
            "foreign_dtype": "bfloat16" if "foreign bfloat16" in rest else None,
            "gate": {"errors": {"own": 2e-7, "aux": 1e-7}, "bounds": {}, "distance": None, "failure": failure},
            "memory": None if failure else {"peak_bytes": peak, "failure": None},
        }

    seconds = {
        "grouped": [0.4, 0.4, 0.8],
        "loop_gather": [0.9, 0.9, 0.9],
        "cpp": [0.2, 0.1, 0.4],
        "cpp, foreign bfloat16": [0.1, 0.1, 0.2],
        "product torch.mm float32": [0.2, 0.2, 0.2],
        "product oneDNN float32": [0.1, 0.1, 0.1],
    }
    timed = {"seconds": seconds, "screened_out": {"all_towers": 3.0}, "others": 0.02}
    return {
        "B": B,
        "M": M,
        "local_dim": 4,
        "global_dim": 4,
        "hidden_dims": [4, 2],
        "distribution": "uniform",
        "operations": {"forward": 3_000_000_000, "backward": 1, "layer_one": 2_000_000_000, "step": 3_000_000_001},
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
        "passes": {"forward": timed, "step": copy.deepcopy(timed)},
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
        "machine": {"torch": "0.0", "threads": "2 of 2 cores"},
        "versions": {"libraries": "a; b"},
        "threads": 2,
        "seed": 0,
        "protocol": {},
        "cells": [fake_cell(B, M) for B in (64, 4096) for M in (2, 8)],
    }


def test_headline_table(record: dict[str, Any]) -> None:
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
    record["cells"][1]["passes"]["step"]["others"] = 0.034
    table = figures.machine_table(record)
    assert "| processor time of others | at most 3.4 % |" in table
    assert "| commit | unknown |" in table
    assert "| threads | 2 used, 2 of 2 cores |" in table
    record["cells"][0]["passes"]["step"]["others"] = None
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
    cell = figures.cells(record)[0]
    cell.data["passes"]["step"]["screened_out"]["all_towers"] = 1e-9
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
    assert text.startswith("a\n<!-- table:grid -->\n\nForward, cpp\n\n| B |")
    assert "Not measured yet: `python benchmarks/trunk.py --suite headline`" in text
    files = sorted(folder.iterdir())
    of_grid = [name for name, (suite, _) in figures.FIGURES.items() if suite == "grid"]
    assert [file.stem for file in files] == sorted(of_grid)
    assert all("<svg" in file.read_text() for file in files)

    contents = [file.read_bytes() for file in files]
    assert CliRunner().invoke(figures.main, arguments, catch_exceptions=False).exit_code == 0
    assert page.read_text() == text
    assert [file.read_bytes() for file in files] == contents


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
    assert {f"figures/{name}.svg" for name in figures.FIGURES} <= {part.split(")")[0] for part in page.split("](")[1:]}


def test_run_writes_what_the_tables_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = trunk.Suite("tests", (TINY,), (*EAGER_PEERS, REFERENCE), budget=1e-6, keep_peers=2)
    monkeypatch.setitem(trunk.SUITES, "quick", few)
    monkeypatch.setattr(sys, "argv", ["benchmarks/trunk.py", "--suite", "quick"])
    out = tmp_path / "trunk_quick.json"
    threads = torch.get_num_threads()
    outcome = CliRunner().invoke(trunk.main, ["--suite", "quick", "--out", str(out)], catch_exceptions=False)
    assert torch.get_num_threads() == threads
    assert outcome.exit_code == 0, outcome.output
    record = json.loads(out.read_text())
    assert record["complete"]
    assert list(tmp_path.iterdir()) == [out]
    (cell,) = figures.cells(record)
    for kind in contenders.PASSES:
        assert len(cell.data["passes"][kind]["screened_out"]) == 2
        assert all(cell.median(peer.name, kind) for peer in EAGER_PEERS)
        best = cell.best_peer("float32", kind)
        assert best is not None
        speed_up = cell.speed_up(best, kind)
        assert speed_up is not None
        assert math.isclose(speed_up.median, 1.0)
    assert figures.headline_table(record).count("\n") == 2 + 1 + len(cell.contenders)


def test_only_disturbed_cells_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(8, 2, 4, 4, (4,)), Cell(16, 2, 4, 4, (4,))]
    suite = trunk.Suite("two cells", tuple(cells), (contenders.REFERENCE,), budget=0.01)
    monkeypatch.setitem(trunk.SUITES, "quick", suite)
    out = tmp_path / "trunk_quick.json"
    arguments = ["--suite", "quick", "--out", str(out), "--no-memory"]
    refused = CliRunner().invoke(trunk.main, [*arguments, "--again"])
    assert refused.exit_code == 2
    assert "there is no earlier run" in refused.output

    assert CliRunner().invoke(trunk.main, arguments, catch_exceptions=False).exit_code == 0
    record = json.loads(out.read_text())
    for cell, share in zip(record["cells"], (0.0, 0.5), strict=True):
        for timed in cell["passes"].values():
            timed["others"] = share
            timed["seconds"] = {}
    out.write_text(json.dumps(record))
    assert CliRunner().invoke(trunk.main, [*arguments, "--again"], catch_exceptions=False).exit_code == 0
    quiet, disturbed = json.loads(out.read_text())["cells"]
    assert quiet == record["cells"][0]
    assert disturbed["passes"]["forward"]["seconds"]["reference"]

    other = CliRunner().invoke(trunk.main, [*arguments, "--again", "--seed", "1"])
    assert other.exit_code == 2
    assert "seed of" in other.output


def test_out_must_lie_in_an_existing_directory(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(trunk.main, ["--out", str(tmp_path / "none" / "x.json")])
    assert outcome.exit_code == 2
    assert "does not exist" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_in_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "_free_bytes", lambda: 2**20)
    cell = Cell(4096, 8, 4, 4, (64,))
    reason = trunk._too_large(EAGER_PEERS[0], cell)
    assert reason is not None
    assert reason.startswith("left out: may need 0.1 GiB")
    assert trunk._too_large(EAGER_PEERS[0], TINY) is None


def test_layers_against_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every formulation is within the gate's bound, and the table has a line a layer, M and pass."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(models, "SHAPES", ((5, (9, 4)),))
    out = tmp_path / "models.json"
    arguments = ["--rows", "70", "--budget", "0.001", "--out", str(out)]
    assert CliRunner().invoke(models.main, arguments, catch_exceptions=False).exit_code == 0
    record = json.loads(out.read_text())
    assert len(record["cells"]) == 2 * len(models.KINDS)
    for cell in record["cells"]:
        assert set(cell["errors"]) == {"grouped", "grouped, compiled", "all_towers", "cpp"}
        assert all(error <= 1e-5 for error in cell["errors"].values())
    table = models.table(record)
    assert table.count("| forward") == table.count("| step") == 2 * len(models.KINDS)

    # Again measures what is missing and what was disturbed, and keeps the rest.
    quiet, disturbed, *_ = record["cells"]
    for cell, share in ((quiet, 0.0), (disturbed, 0.5)):
        for timed in cell["passes"].values():
            timed["others"] = share
    out.write_text(json.dumps(record | {"cells": [quiet, disturbed]}))
    measured = []
    monkeypatch.setattr(models, "measure", lambda cell, *_: measured.append(cell) or record["cells"][2])
    assert CliRunner().invoke(models.main, [*arguments, "--again"], catch_exceptions=False).exit_code == 0
    assert len(measured) == 2 * len(models.KINDS) - 1
    assert json.loads(out.read_text())["cells"][0] == quiet


def test_a_layer_without_a_correct_contender_is_an_error() -> None:
    cell = models.Cell("towers (GroupedMLP)", 4, 2, 3, (5,))
    functions = dict.fromkeys(("grouped", "cpp"), lambda x: x)
    assert set(models.admitted(cell, functions, {"grouped": 1e-6, "cpp": 1e-6})) == {"grouped", "cpp"}
    with pytest.raises(click.ClickException, match=r"no plain formulation .*: grouped 2\.0e-05, cpp 1\.0e-06"):
        models.admitted(cell, functions, {"grouped": 2e-5, "cpp": 1e-6})
    with pytest.raises(click.ClickException, match="the layer itself is outside"):
        models.admitted(cell, functions, {"grouped": 1e-6, "cpp": math.nan})


def test_rows_at_a_kink_are_replaced() -> None:
    cell = models.Cell("towers (GroupedMLP)", 50, 2, 3, (5, 4))
    kind = models.KINDS[cell.layer]
    torch.manual_seed(0)
    layer = kind.make(cell, "reference").double()
    x, scenario = torch.randn(50, 3, dtype=torch.float64), torch.randint(2, (50,))
    with torch.no_grad():
        # Row 7 has a ReLU input of exactly 0 in the second layer.
        k = int(scenario[7])
        first = (x[7] @ layer.weights[0][k] + layer.biases[0][k]).relu()
        layer.biases[1][k, 2] = -(first @ layer.weights[1][k, :, 2])
        margin = models.relu_margin(layer, kind, x, scenario)
    assert margin[7] < 1e-12
    assert (margin < workload.KINK_MARGIN).sum() < 5


def test_layers_page_shows_the_results() -> None:
    page = models.PAGE.read_text(encoding="utf-8")
    if not models.RESULTS.exists():
        assert "<!-- models -->\n<!-- end -->" in page
        return
    assert models.render(json.loads(models.RESULTS.read_text(encoding="utf-8")), page) == page
