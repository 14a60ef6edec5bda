"""saml-rec compare: what it writes, what it repeats, what it refuses, and when it calls a difference one."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from saml_rec import comparison
from saml_rec.data import prepare
from saml_rec.data.schema import load_schema
from saml_rec.evaluation.mutual_weights import mean_mutual_weights
from saml_rec.evaluation.scoring import load_trained


@pytest.fixture(scope="module")
def compared(small_dataset, tmp_path_factory):
    """Two models, two seeds, two epochs. Do not write to it: copy it."""
    from click.testing import CliRunner

    from saml_rec.cli import main

    out = tmp_path_factory.mktemp("compare") / "out"
    result = CliRunner().invoke(main, arguments(small_dataset, out))
    assert result.exit_code == 0, result.output
    assert str(out / "report.html") in result.output.splitlines()[-1]
    return out


def arguments(dataset, out, models="saml,shared_bottom", seeds=2, epochs=2):
    options = ["compare", "--data", dataset.data, "--schema", dataset.schema, "--out", out, "--models", models]
    return [str(option) for option in [*options, "--seeds", seeds, "--epochs", epochs, "--batch-size", 64]]


def read(out):
    return json.loads((out / "compare.json").read_text(encoding="utf-8"))


def test_the_table_fits_80_columns_with_every_word_whole():
    summary = {"mean": 0.7153, "deviation": 0.0024}
    entry = {"overall": {"auc": summary, "logloss": summary}, "parameters": 99_999_999}
    entry |= {"rows_per_second": {"mean": 1_234_567}, "peak_bytes": 99_999 * 2**20}
    console = Console(width=80, file=io.StringIO())
    console.print(comparison.comparison_table({"models": {"shared_bottom": entry}}))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2].split("  ")[0] == "shared_bottom"
    assert lines[2].split()[1:] == [
        "0.7153",
        "±",
        "0.0024",
        "0.7153",
        "±",
        "0.0024",
        "99,999,999",
        "1,234,567",
        "99,999",
    ]


def test_means_and_deviations_are_those_of_the_runs(compared):
    record = read(compared)
    assert list(record["models"]) == ["saml", "shared_bottom"]
    for name, model in record["models"].items():
        runs = [json.loads((compared / "runs" / name / f"seed-{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
        assert [run["seed"] for run in runs] == [0, 1]
        aucs = [run["overall"]["auc"] for run in runs]
        assert aucs[0] != aucs[1]
        assert model["overall"]["auc"]["mean"] == pytest.approx(np.mean(aucs))
        assert model["overall"]["auc"]["deviation"] == pytest.approx(np.std(aucs, ddof=1))
        for index, scenario in enumerate(record["scenarios"]):
            losses = [run["scenarios"][scenario["name"]]["logloss"] for run in runs]
            assert model["scenarios"][index]["logloss"]["mean"] == pytest.approx(np.mean(losses))
        assert model["parameters"] == runs[0]["parameters"] > 0
        assert model["peak_bytes"] is None or model["peak_bytes"] > 2**20
    saml, bottom = record["models"].values()
    assert bottom["mutual_weights"] is None
    weights = np.array(saml["mutual_weights"]["1"])
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert (weights.diagonal() == 0).all()


def test_every_run_sees_the_same_rows(compared):
    counts = [
        json.loads((path / "metrics.json").read_text())["scenarios"] for path in sorted(compared.glob("runs/*/seed-*"))
    ]
    assert len(counts) == 4
    assert all({n: s["rows"] for n, s in c.items()} == {n: s["rows"] for n, s in counts[0].items()} for c in counts)


def test_mean_mutual_weights_are_the_average_of_own_rows(compared, small_dataset):
    trained = load_trained(compared / "runs" / "saml" / "seed-0")
    table = prepare(small_dataset.data, load_schema(small_dataset.schema), seed=0).tables["train"]
    found = mean_mutual_weights(trained.model, table, trained.device)[1]
    with torch.no_grad():
        rows = trained.model.mutual_weights(table.batch(torch.arange(len(table))))[1].double().numpy()
    for scenario in range(table.num_scenarios):
        np.testing.assert_allclose(found[scenario], rows[table.scenario.numpy() == scenario].mean(axis=0), rtol=1e-5)


def test_a_finished_run_is_not_trained_again_and_a_missing_one_is(compared, small_dataset, saml_rec, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    kept, missing = out / "runs/saml/seed-0/model.pt", out / "runs/shared_bottom/seed-1"
    before, stamp = read(out), kept.stat().st_mtime_ns
    shutil.rmtree(missing)
    result = saml_rec(*arguments(small_dataset, out))
    assert result.exit_code == 0, result.output
    assert kept.stat().st_mtime_ns == stamp
    assert result.output.count("epoch 2/2") == 1
    after = read(out)
    for name in before["models"]:
        assert after["models"][name]["overall"] == before["models"][name]["overall"]


def test_more_seeds_and_models_add_to_what_is_there(compared, small_dataset, saml_rec, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    result = saml_rec(*arguments(small_dataset, out, seeds=3))
    assert result.exit_code == 0, result.output
    assert result.output.count("epoch 2/2") == 2
    assert read(out)["seeds"] == [0, 1, 2]


def test_other_options_are_refused(compared, small_dataset, saml_rec, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    result = saml_rec(*arguments(small_dataset, out, epochs=3))
    assert result.exit_code == 2
    assert "epochs was 2, is 3" in result.output


def test_options_of_one_model_only(small_dataset, saml_rec, tmp_path):
    out = tmp_path / "out"
    settings = ["saml.hidden-dims=8,4", "saml.score=softmax", "saml.lr=0.002", "shared_bottom.weight_decay=0.5"]
    given = [part for setting in settings for part in ("--set", setting)]
    result = saml_rec(*arguments(small_dataset, out, seeds=1, epochs=1), *given)
    assert result.exit_code == 0, result.output
    saml, bottom = read(out)["models"].values()
    assert saml["changes"] == {"hidden_dims": [8, 4], "score": "softmax", "learning_rate": 0.002}
    assert bottom["changes"] == {"weight_decay": 0.5}
    assert saml["options"]["model_options"]["hidden_dims"] == [8, 4]
    assert (saml["options"]["learning_rate"], bottom["options"]["learning_rate"]) == (0.002, 0.001)
    assert (saml["options"]["weight_decay"], bottom["options"]["weight_decay"]) == (1.0, 0.5)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Options of one model only: saml: hidden dims (8, 4), score softmax, learning rate 0.002;" in page
    # They belong to the run: without them it is another one.
    again = saml_rec(*arguments(small_dataset, out, seeds=1, epochs=1))
    assert again.exit_code == 2
    assert "learning_rate was 0.002, is 0.001" in again.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("dropout=0.1", "is not of the form MODEL.OPTION=VALUE"),
        ("saml.dropout", "is not of the form MODEL.OPTION=VALUE"),
        ("saml.depth=3", "there is no option 'depth' (options: lr, weight-decay, hidden-dims,"),
        ("saml.dropout=much", "'much' is not a valid float"),
        ("star.dropout=0.1", "error: --set star.dropout: star is not among --models"),
        ("shared_bottom.gate=scalar", "error: model shared_bottom does not take gate; it takes hidden_dims"),
        ("saml.mutual-layers=7", "error: model saml: mutual_layers must lie in 1..2, got 7"),
        ("saml.lr=0", "error: learning_rate must be above 0 and finite, got 0.0"),
    ],
)
def test_bad_settings(small_dataset, saml_rec, tmp_path, setting, message):
    result = saml_rec(*arguments(small_dataset, tmp_path / "out"), "--set", setting)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("saml,nothing", "there is no model 'nothing'"),
        ("saml,saml", "models named more than once: saml"),
        (",", "no models to compare"),
    ],
)
def test_bad_models(small_dataset, saml_rec, tmp_path, models, message):
    result = saml_rec(*arguments(small_dataset, tmp_path / "out", models=models))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_refused(small_dataset, saml_rec, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = saml_rec(*arguments(small_dataset, tmp_path))
    assert result.exit_code == 2
    assert "holds no comparison" in result.output


def test_the_reference_epoch_is_printed(small_dataset, saml_rec, tmp_path):
    result = saml_rec(*arguments(small_dataset, tmp_path / "out", models="saml", seeds=1), "--reference-epoch")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("saml, one epoch: ")]
    assert "reference" in line


@pytest.mark.parametrize(
    ("first", "second", "exceeds"),
    [
        ([0.70, 0.71, 0.72], [0.60, 0.61, 0.62], True),
        ([0.70, 0.71, 0.72], [0.70, 0.71, 0.72], False),
        ([0.70, 0.71, 0.72], [0.695, 0.705, 0.715], False),  # as seeds, but less than they spread
        ([0.60, 0.80, 0.90], [0.70, 0.60, 0.65], False),
        ([0.7], [0.6], None),
    ],
)
def test_judge(first, second, exceeds):
    verdict = comparison.judge(first, second)
    assert verdict["exceeds_spread"] is exceeds
    assert verdict["mean"] == pytest.approx(np.mean(first) - np.mean(second))
    if len(first) > 1:
        pooled = math.sqrt((np.var(first, ddof=1) + np.var(second, ddof=1)) / 2)
        assert verdict["pooled_deviation"] == pytest.approx(pooled)


def test_calibration_of_right_probabilities_lies_on_the_diagonal():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=50_000)
    labels = (draw.random(50_000) < 1 / (1 + np.exp(-logits))).astype(float)
    groups = comparison.calibration(labels, logits)
    assert [group["rows"] for group in groups] == [5000] * 10
    for group in groups:
        assert group["observed"] == pytest.approx(group["predicted"], abs=0.025)
    shifted = comparison.calibration(labels, logits + 1)
    assert all(group["predicted"] - group["observed"] > 0.05 for group in shifted)
    assert len(comparison.calibration(labels[:3], logits[:3])) == 3
