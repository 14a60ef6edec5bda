"""benchmarks/star_products.py: products in the kernels beside products in PyTorch."""

import json

import click
import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from click.testing import CliRunner

import records
import star_products
from saml_kernels.testing.timing import Protocol


def test_a_run_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(star_products, "WIDTHS", (5, 9, 6, 1))
    out = tmp_path / "star.json"
    arguments = ["--rows", "3", "--rows", "70", "--budget", "0.001", "--out", str(out)]
    done = CliRunner().invoke(star_products.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    record = json.loads(out.read_text())
    assert [(cell.B, cell.M) for cell in records.cells(record)] == [(3, 8), (70, 8)]
    assert all(cell["error"] <= 1e-5 for cell in record["cells"])
    table = star_products.table(record)
    assert [table.count(f"| {name} |") for name in ("forward", "step")] == [2, 2]
    kernels, pytorch = (
        records.cells(record)[0].timed(name, "step") for name in (star_products.KERNELS, star_products.PYTORCH)
    )
    assert f"| {kernels.ratio:.2f} ({kernels.ratio_p20:.2f}–{kernels.ratio_p80:.2f}) |" in table
    assert pytorch.ratio is None


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(star_products, "WIDTHS", (5, 9, 6, 1))
    formed = star_products.formed_in_pytorch
    monkeypatch.setattr(star_products, "formed_in_pytorch", lambda *arguments: 1.001 * formed(*arguments))
    torch.manual_seed(0)
    with pytest.raises(click.ClickException, match=r"Cell\(B=9\): the two differ by \d\.\de-0\d, more than 1e-05"):
        star_products.measure(star_products.Cell(9), Protocol(budget=0.001))


def test_the_page_shows_the_results():
    page = star_products.PAGE.read_text(encoding="utf-8")
    record = json.loads(star_products.RESULTS.read_text(encoding="utf-8"))
    assert star_products.render(record, page) == page
    assert star_products.table(record) in page
