"""benchmarks/models.py: layers against plain PyTorch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

import models
import records
from saml_kernels.layers import ScoreMixture


def test_layers_against_plain_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every formulation is within the gate's bound, and the table has a line a layer, M and pass."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(models, "SHAPES", ((5, (9, 4)),))
    out = tmp_path / "models.json"
    arguments = ["--rows", "70", "--budget", "0.001", "--out", str(out)]
    assert CliRunner().invoke(models.main, arguments, catch_exceptions=False).exit_code == 0
    record = json.loads(out.read_text())
    assert len(record["cells"]) == 2 * len(models.KINDS)
    for cell in records.cells(record):
        assert set(cell.contenders) == {"grouped", "grouped, compiled", "all_towers", "cpp"}
        assert all(entry["error"] <= 1e-5 for entry in cell.contenders.values())
    table = models.table(record)
    assert table.count("| forward") == table.count("| step") == 2 * len(models.KINDS)

    # Again measures what is missing and what was disturbed, and keeps the rest.
    quiet, disturbed, *_ = record["cells"]
    for cell, share in ((quiet, 0.0), (disturbed, 0.5)):
        cell["others"] = dict.fromkeys(cell["others"], share)
    out.write_text(json.dumps(record | {"cells": [quiet, disturbed]}))
    measured = []
    monkeypatch.setattr(models, "measure", lambda cell, *_: measured.append(cell) or record["cells"][2])
    assert CliRunner().invoke(models.main, [*arguments, "--again"], catch_exceptions=False).exit_code == 0
    assert len(measured) == 2 * len(models.KINDS) - 1
    assert json.loads(out.read_text())["cells"][0] == quiet


def test_a_layer_without_a_correct_contender_is_an_error() -> None:
    cell = models.Cell("towers (GroupedMLP)", 4, 2, 3, (5,))
    assert models.admitted(cell, {"grouped": 1e-6, "all_towers": 2e-5, "cpp": 1e-6}) == ["grouped", "cpp"]
    with pytest.raises(click.ClickException, match=r"no plain formulation .*: grouped 2\.0e-05, cpp 1\.0e-06"):
        models.admitted(cell, {"grouped": 2e-5, "cpp": 1e-6})
    with pytest.raises(click.ClickException, match="the layer itself is outside"):
        models.admitted(cell, {"grouped": 1e-6, "cpp": math.nan})


@pytest.mark.parametrize("name", models.KINDS)
def test_rows_at_a_kink_are_found(name: str) -> None:
    kind = models.KINDS[name]
    torch.manual_seed(0)
    layer = kind.make(models.Cell(name, 50, 2, 3, (5, 4)), "reference").double()
    x, scenario = torch.randn(50, 3, dtype=torch.float64), torch.randint(2, (50,))
    with torch.no_grad():
        weights, biases = kind.parameters(layer)
        # Row 7 has a ReLU input of exactly 0 in the second layer.
        k = int(scenario[7])
        first = (x[7] @ weights[0][k] + biases[0][k]).relu()
        shift = first @ weights[1][k, :, 2] + biases[1][k, 2]
        own = layer.networks if isinstance(layer, ScoreMixture) else layer
        own.biases[1][k, 2] -= shift
        near = models.near_kink(layer, kind, x, scenario)
    assert near[7]
    assert near.sum() < 5


def test_layers_page_shows_the_results() -> None:
    page = models.PAGE.read_text(encoding="utf-8")
    if not models.RESULTS.exists():
        assert "<!-- models -->\n<!-- end -->" in page
        return
    assert models.render(json.loads(models.RESULTS.read_text(encoding="utf-8")), page) == page
