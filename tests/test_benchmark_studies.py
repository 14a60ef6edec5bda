"""Studies of single options by validation log loss: what is run, and the table."""

import json

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from click.testing import CliRunner

import id_dropout
import option_study
import scenario_rate
from saml_rec.data import write_synthetic
from saml_rec.models.registry import hyperparameters


def test_options_of_training_and_of_models():
    options = scenario_rate.STUDY.options("star", scenario_rate.ROOT, 4)
    assert (options.model, options.scenario_rate, options.model_options) == ("star", 0.5, {})
    options = id_dropout.STUDY.options("mlp", 0.2, 4)
    assert (options.model, options.scenario_rate, options.model_options) == ("mlp", None, {"id_dropout": 0.2})
    for model in id_dropout.STUDY.models:
        assert hyperparameters(model)["id_dropout"] in id_dropout.STUDY.values


def test_a_study_measures_what_its_record_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(option_study, "DATA", {"tiny": lambda folder: write_synthetic(folder, rows=600)})
    page = tmp_path / "results.md"
    page.write_text("<!-- tried -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(option_study, "PAGE", page)
    out = tmp_path / "out.json"
    calls = []
    whole = option_study.train_and_validate
    monkeypatch.setattr(option_study, "train_and_validate", lambda *given: calls.append(given) or whole(*given))
    for values, trained in (((1.0,), 2), ((1.0, 0.1), 2), ((1.0, 0.1), 0)):
        study = option_study.Study("scenario_rate", values, ("shared_bottom",))
        arguments = ["--out", str(out), *(["--more"] if out.exists() else [])]
        result = CliRunner().invoke(option_study.command(study, "tried", str, None), arguments)
        assert result.exit_code == 0, result.output
        assert len(calls) == trained
        calls.clear()
    rows = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert [row["scenario_rate"] for row in rows] == [1.0, 0.1]
    one, less = (row["valid_logloss"]["mean"] for row in rows)
    assert one != less
    text = page.read_text(encoding="utf-8")
    assert "| | tiny, M = 4: 1.0 | 0.1 adds |" in text.replace("|  |", "| |")
    assert f"| shared_bottom | {one:.4f} | {less - one:+.4f} |" in text
    assert f"| mean |  | {less - one:+.4f} |" in text
