"""benchmarks/models.py: layers against plain PyTorch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import model_kinds
import models
import records
from saml_kernels.activations import ACTIVATIONS

M = 3
CELLS = sum(len(kind.scenarios) for kind in models.KINDS.values())


def test_layers_against_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every formulation is within the gate's bound, and the table has a line a layer, M and pass."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(models, "SHAPES", ((5, (9, 6, 4)),))
    out = tmp_path / "models.json"
    arguments = ["--rows", "70", "--budget", "0.001", "--out", str(out)]
    assert CliRunner().invoke(models.main, arguments, catch_exceptions=False).exit_code == 0
    record = json.loads(out.read_text())
    assert len(record["cells"]) == CELLS
    for cell in records.cells(record):
        assert set(cell.contenders) == {"grouped", "grouped, compiled", "all_towers", "cpp"}
        assert all(entry["error"] <= 1e-5 for entry in cell.contenders.values())
    table = models.table(record)
    assert table.count("| forward") == table.count("| step") == CELLS

    # Again measures what is missing and what was disturbed, and keeps the rest.
    quiet, disturbed, *_ = record["cells"]
    for cell, share in ((quiet, 0.0), (disturbed, 0.5)):
        cell["others"] = dict.fromkeys(cell["others"], share)
    out.write_text(json.dumps(record | {"cells": [quiet, disturbed]}))
    measured = []
    monkeypatch.setattr(models, "measure", lambda cell, *_: measured.append(cell) or record["cells"][2])
    assert CliRunner().invoke(models.main, [*arguments, "--again"], catch_exceptions=False).exit_code == 0
    assert len(measured) == CELLS - 1
    assert json.loads(out.read_text())["cells"][0] == quiet


def test_a_layer_without_a_correct_contender_is_an_error() -> None:
    cell = models.Cell("towers (GroupedMLP)", 4, 2, 3, (5,))
    assert models.admitted(cell, {"grouped": 1e-6, "all_towers": 2e-5, "cpp": 1e-6}) == ["grouped", "cpp"]
    with pytest.raises(click.ClickException, match=r"no plain formulation .*: grouped 2\.0e-05, cpp 1\.0e-06"):
        models.admitted(cell, {"grouped": 2e-5, "cpp": 1e-6})
    with pytest.raises(click.ClickException, match="the layer itself is outside"):
        models.admitted(cell, {"grouped": 1e-6, "cpp": math.nan})


def made(name: str, rows: int, backend: str) -> tuple[torch.nn.Module, list[torch.Tensor], torch.Tensor]:
    """A layer, moved away from its start, its inputs and ids."""
    torch.manual_seed(0)
    kind = models.KINDS[name]
    layer = kind.make(models.Cell(name, rows, M, 3, (6, 5, 4)), backend).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = [torch.randn(rows, width, dtype=torch.float64) for width in (3, *kind.more_inputs)]
    return layer, [x.requires_grad_() for x in inputs], torch.randint(M, (rows,))


@pytest.mark.parametrize("name", models.KINDS)
def test_rows_at_a_kink_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the arguments of every relu that the reference calls with a graph, one row at a time."""
    layer, inputs, scenario = made(name, 12, "reference")
    way = model_kinds.Margins(scenario, M)
    models.KINDS[name].plain(layer, inputs, way)

    arguments: list[float] = []

    def relu(z: torch.Tensor) -> torch.Tensor:
        if z.requires_grad and z.numel() > 0:
            arguments.append(float(z.detach().abs().min()))
        return torch.relu(z)

    monkeypatch.setitem(ACTIVATIONS, "relu", dataclasses.replace(ACTIVATIONS["relu"], function=relu))
    for row in range(12):
        arguments.clear()
        layer(*(x[row : row + 1] for x in inputs), scenario[row : row + 1])
        assert way.smallest[row] == pytest.approx(min(arguments), rel=1e-9)

    threshold = float(way.smallest.sort().values[3])
    monkeypatch.setattr(models, "KINK_MARGIN", threshold)
    assert models.near_kink(layer, models.KINDS[name], inputs, scenario, M).sum() == 3


@pytest.mark.parametrize("name", models.KINDS)
def test_operations(name: str) -> None:
    """What public code runs is what all M scenarios' towers, gates and own experts cost."""
    layer, inputs, scenario = made(name, 12, "reference")
    ways = {way.__name__: way(scenario, M) for way in (model_kinds.Grouped, model_kinds.EveryTower)}
    counts = models.multiply_adds(models.KINDS[name], layer, inputs, ways)
    needed, public = counts["Grouped"], counts["EveryTower"]
    tower = 2 * 12 * (3 * 6 + 6 * 5 + 5 * 4 + 4)
    if name.startswith(("towers", "STAR")):
        assert needed == {"forward": tower, "step": 3 * tower}
        assert public == {"forward": M * tower, "step": 3 * M * tower}
    for measured in ("forward", "step"):
        assert needed[measured] <= public[measured] <= M * needed[measured]
    if name == "HMoE":
        # Every scenario scores every row, so that forward has M weights and gates less to gain only.
        assert needed["forward"] > 0.6 * public["forward"]
        assert needed["step"] < 0.8 * public["step"]


def test_layers_page_shows_the_results() -> None:
    page = models.PAGE.read_text(encoding="utf-8")
    if not models.RESULTS.exists():
        assert "<!-- models -->\n<!-- end -->" in page
        return
    assert models.render(json.loads(models.RESULTS.read_text(encoding="utf-8")), page) == page


def test_cells_of_another_machine_are_not_mixed_in(tmp_path):
    record = json.loads(models.RESULTS.read_text(encoding="utf-8"))
    out = tmp_path / "models.json"
    out.write_text(json.dumps(record | {"machine": {"processor": "another"}}), encoding="utf-8")
    with pytest.raises(click.BadParameter, match=r"machine of .* differs"):
        records.earlier_cells(out, record)
    out.write_text(json.dumps(record), encoding="utf-8")
    assert records.earlier_cells(out, record) == record["cells"]
