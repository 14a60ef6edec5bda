"""Studies of single options by validation log loss: what is run, the table, and that the page shows the results."""

import json

import pytest

pytest.importorskip("matplotlib", reason="the extra saml-kernels[bench] is not installed")

from click.testing import CliRunner

import id_dropout
import option_study
import saml_forms
import scenario_decay
import scenario_embedding
import scenario_rate
from saml_rec.data import write_synthetic
from saml_rec.models.registry import hyperparameters

STUDIES = {
    "scenario rate": scenario_rate,
    "scenario decay": scenario_decay,
    "scenario embedding": scenario_embedding,
    "id dropout": id_dropout,
    "saml forms": saml_forms,
}


def test_options_of_training_and_of_models():
    options = scenario_rate.STUDY.options("star", scenario_rate.ROOT, 4)
    assert (options.model, options.scenario_rate, options.model_options) == ("star", 0.5, {})
    options = id_dropout.STUDY.options("mlp", 0.1, 4)
    assert (options.model, options.scenario_rate, options.model_options) == ("mlp", None, {"id_dropout": 0.1})
    for name, form in saml_forms.FORMS.items():
        options = saml_forms.STUDY.options("saml", name, 4)
        assert (options.scenario_rate, options.model_options) == (None, {"scenario_dim": 0, **form})
        assert form.keys() <= hyperparameters("saml").keys()
    assert hyperparameters("saml")["scenario_dim"] == scenario_embedding.STUDY.values[-1]
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
        study = option_study.Study("scenario_rate", values, ("shared_bottom",), data=("tiny",))
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
    assert text.splitlines()[1:5] == [
        "|  | tiny, M = 4 |",
        "| --- | --- |",
        f"| 1.0 | {one:.4f} |",
        f"| 0.1 | {less - one:+.4f} |",
    ]


def test_several_models_are_shown_with_their_mean():
    study = option_study.Study("dropout", (0.0, 0.5), ("star", "mlp"))
    losses = {("star", 0.0): 0.5, ("star", 0.5): 0.52, ("mlp", 0.0): 0.6, ("mlp", 0.5): 0.61}
    runs = [
        {"data": "tiny", "scenarios": 4, "model": model, "dropout": value, "valid_logloss": {"mean": loss}}
        for (model, value), loss in losses.items()
    ]
    assert option_study.table(study, {"runs": runs}, str).splitlines() == [
        "|  | tiny, M = 4: 0.0 | 0.5 adds |",
        "| --- | --- | --- |",
        "| star | 0.5000 | +0.0200 |",
        "| mlp | 0.6000 | +0.0100 |",
        "| mean |  | +0.0150 |",
    ]


@pytest.mark.parametrize("place", STUDIES)
def test_the_page_shows_the_results(place):
    module = STUDIES[place]
    page = option_study.PAGE.read_text(encoding="utf-8")
    record = json.loads(module.STUDY.result.read_text(encoding="utf-8"))
    assert f"<!-- {place} -->\n{option_study.table(module.STUDY, record, module.label)}\n<!-- end -->" in page
