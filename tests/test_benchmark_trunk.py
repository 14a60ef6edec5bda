"""benchmarks/trunk.py: a run, a run again, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cells
import contenders
import figures
import trunk
from contenders import EAGER_PEERS, REFERENCE, Contender
from saml_kernels.testing.problem import PASSES
from workload import Cell

TINY = Cell(B=37, M=3, local_dim=5, global_dim=6, hidden_dims=(7, 4))


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
    for kind in PASSES:
        assert sum(row.measured == kind and row.rounds == 0 for row in cell.rows.values()) == 2
        assert all(cell.median(peer.name, kind) for peer in EAGER_PEERS)
        best = cell.best_peer("float32", kind)
        assert best is not None
        speed_up = cell.speed_up(best, kind)
        assert speed_up is not None
        assert speed_up.ratio == 1.0
    assert figures.headline_table(record).count("\n") == 2 + 1 + len(cell.contenders)


def test_an_interrupted_call_does_not_screen_a_peer_out() -> None:
    calls: list[str] = []
    for taken, fastest, count in (((0.05, 0.001, 0.002, 0.001, 0.001), 0.001, 5), ((0.3, 0.1), 0.3, 1)):
        calls.clear()
        clock = iter(taken)
        assert cells.seconds_of_fastest(lambda: calls.append("call"), lambda _, __, clock=clock: next(clock)) == fastest
        assert len(taken) - len(list(clock)) == count
        assert calls == ["call"]


def test_only_disturbed_cells_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = [Cell(8, 2, 4, 4, (4,)), Cell(16, 2, 4, 4, (4,))]
    suite = trunk.Suite("two cells", tuple(two), (REFERENCE,), budget=0.01)
    monkeypatch.setitem(trunk.SUITES, "quick", suite)
    out = tmp_path / "trunk_quick.json"
    arguments = ["--suite", "quick", "--out", str(out), "--no-memory"]
    refused = CliRunner().invoke(trunk.main, [*arguments, "--again"])
    assert refused.exit_code == 2
    assert "there is no earlier run" in refused.output

    assert CliRunner().invoke(trunk.main, arguments, catch_exceptions=False).exit_code == 0
    record = json.loads(out.read_text())
    for cell, share in zip(record["cells"], (0.0, 0.5), strict=True):
        cell["others"] = dict.fromkeys(cell["others"], share)
        cell["rows"] = []
    out.write_text(json.dumps(record))
    assert CliRunner().invoke(trunk.main, [*arguments, "--again"], catch_exceptions=False).exit_code == 0
    quiet, disturbed = json.loads(out.read_text())["cells"]
    assert quiet == record["cells"][0]
    assert disturbed["rows"][0][:2] == ["reference", "forward"]

    other = CliRunner().invoke(trunk.main, [*arguments, "--again", "--seed", "1"])
    assert other.exit_code == 2
    assert "seed of" in other.output


def test_out_must_lie_in_an_existing_directory(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(trunk.main, ["--out", str(tmp_path / "none" / "x.json")])
    assert outcome.exit_code == 2
    assert "does not exist" in outcome.output
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_in_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    host = cells.Host()
    monkeypatch.setattr(host, "free_bytes", lambda: 2**20)
    reason = cells.Entry(host, Cell(4096, 8, 4, 4, (64,)), EAGER_PEERS[0], dynamic=False).too_large()
    assert reason is not None
    assert reason.startswith("left out: may need 0.1 GiB")
    assert cells.Entry(host, TINY, EAGER_PEERS[0], dynamic=False).too_large() is None


def test_peers_in_bfloat16_take_part_where_onednn_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host = cells.Host()
    peer, ours = Contender("grouped", dtype=torch.bfloat16), Contender("cpp", dtype=torch.bfloat16)
    monkeypatch.setattr(cells, "onednn_multiplies", lambda dtype: dtype == torch.float32)
    assert host.lacks(peer) == "left out: oneDNN has no product of bfloat16 on this processor"
    assert host.lacks(ours) is None
    assert host.lacks(EAGER_PEERS[0]) is None
    monkeypatch.setattr(cells, "onednn_multiplies", lambda dtype: True)
    assert host.lacks(peer) is None


def test_products_in_bfloat16_are_timed_where_onednn_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = {torch.float32, torch.bfloat16}
    for multiplied, libraries in ((dtypes, ["oneDNN", "torch.mm"]), ({torch.float32}, [])):
        monkeypatch.setattr(contenders, "onednn_multiplies", multiplied.__contains__)
        found = contenders.products(dtypes)
        assert sorted(product.library for product in found if product.dtype == torch.bfloat16) == libraries
        assert sorted(product.library for product in found if product.dtype == torch.float32) == ["oneDNN", "torch.mm"]
