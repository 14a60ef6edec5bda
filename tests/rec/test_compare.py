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
from saml_rec.evaluation.scoring import TrainedModel, load_trained


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


def table_lines(entries, metrics=("auc", "logloss")):
    console = Console(width=80, file=io.StringIO())
    console.print(comparison.comparison_table({"models": entries, "metrics": list(metrics)}))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("name", ["shared_bottom", "logistic_regression"])
def test_the_table_fits_80_columns_with_every_word_whole(name):
    summary = {"mean": 0.7153, "deviation": 0.0024, "interval": [0.70004, 0.73126]}
    entry = {"overall": dict.fromkeys(("auc", "logloss", "gauc"), summary), "parameters": 99_999_999}
    entry |= {"rows_per_second": {"mean": 1_234_567}}
    lines = table_lines({name: entry})
    assert len(lines) == 4
    assert lines[2].split() == [name, "0.7153", "±", "0.0024", "0.7153", "±", "0.0024", "99,999,999", "1,234,567"]
    assert lines[3].split() == ["0.7000", "–", "0.7313"] * 2
    lines = table_lines({name: entry}, ("auc", "logloss", "gauc"))
    assert lines[0].split() == ["model", "AUC", "log", "loss", "GAUC"]
    assert lines[2].split() == [name, *["0.7153", "±", "0.0024"] * 3]
    assert lines[3].split() == ["0.7000", "–", "0.7313"] * 3
    alone = {"mean": 0.7153, "deviation": None, "interval": None}
    assert table_lines({name: entry | {"overall": {"auc": alone, "logloss": alone}}})[2].split() == [
        name,
        "0.7153",
        "0.7153",
        "99,999,999",
        "1,234,567",
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
    assert after["differences"] == before["differences"]


def test_scores_are_kept_and_not_made_again_unless_they_are_gone_or_of_another_model(
    compared, small_dataset, saml_rec, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    kept = [out / "runs" / name / "seed-0" / "test-logits.npy" for name in ("saml", "shared_bottom")]
    expected = [np.load(path) for path in kept]
    assert all(scores.shape == (40,) for scores in expected)
    table = prepare(small_dataset.data, load_schema(small_dataset.schema), seed=0).tables["test"]
    np.testing.assert_array_equal(expected[0], load_trained(kept[0].parent).logits(table))
    kept[0].unlink()
    np.save(kept[1], expected[1][::-1])  # as those of another model would be
    scored = []
    logits = TrainedModel.logits
    monkeypatch.setattr(TrainedModel, "logits", lambda self, table: scored.append(self) or logits(self, table))
    assert saml_rec(*arguments(small_dataset, out)).exit_code == 0
    assert len(scored) == 2
    for path, scores in zip(kept, expected, strict=True):
        np.testing.assert_array_equal(np.load(path), scores)
    assert read(out) == read(compared)
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    assert saml_rec(*arguments(small_dataset, out)).exit_code == 0
    assert len(scored) == 3
    assert saml_rec(*arguments(small_dataset, out)).exit_code == 0
    assert len(scored) == 3


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[-1 - bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


RUN = "runs/shared_bottom/seed-0"
LOGITS, ADDED = f"{RUN}/test-logits.npy", f"{RUN}/run.json"
KEPT_DAMAGES = {
    "the lowest bit of a score": (lambda out: flipped(out / LOGITS, 0), LOGITS),
    "a bit of the header": (lambda out: flipped(out / LOGITS, 8 * 4 * 40 + 100), LOGITS),
    "an empty file of scores": (lambda out: (out / LOGITS).write_bytes(b""), LOGITS),
    "an archive for scores": (lambda out: np.savez((out / LOGITS).open("wb"), a=np.ones(3)), LOGITS),
    "a list": (lambda out: (out / ADDED).write_text("[]"), ADDED),
    "nothing": (lambda out: (out / ADDED).write_text(""), ADDED),
    "nested": (lambda out: (out / ADDED).write_text("[" * 100_000), ADDED),
    "an empty object": (lambda out: (out / ADDED).write_text("{}"), ADDED),
    "another weight": (lambda out: (out / ADDED).write_text((out / ADDED).read_text().replace("null", "[]")), ADDED),
}


@pytest.mark.parametrize("name", KEPT_DAMAGES)
def test_what_a_command_before_kept_is_made_again_if_it_is_damaged(compared, small_dataset, saml_rec, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    damage, file = KEPT_DAMAGES[name]
    before, scores = read(out), (out / LOGITS).read_bytes()
    damage(out)
    result = saml_rec(*arguments(small_dataset, out))
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.endswith("; making it again")]
    assert line.startswith(f"{out / file}: is damaged")
    after = read(out)
    for model in after["models"].values():
        del model["peak_bytes"]  # of a run that nobody watched
    for model in before["models"].values():
        del model["peak_bytes"]
    assert after == before
    assert (out / LOGITS).read_bytes() == scores
    assert "making it again" not in saml_rec(*arguments(small_dataset, out)).stdout


@pytest.mark.parametrize("name", ["model.pt", "metrics.json", "history.json"])
def test_a_damaged_run_ends_a_comparison_in_one_line(compared, small_dataset, saml_rec, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    flipped(out / RUN / name, 1000)
    before = (out / "compare.json").read_bytes()
    result = saml_rec(*arguments(small_dataset, out))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: {out / RUN / name}: is damaged")
    assert (out / "compare.json").read_bytes() == before
    # Without the run the comparison goes on.
    shutil.rmtree(out / RUN)
    assert saml_rec(*arguments(small_dataset, out)).exit_code == 0


# Compares in a process that kills itself before its synchronisation number COUNT, or finds the disk full there.
ENDED = """
import errno, os, signal, sys, torch
from saml_rec import cli
count, how, *arguments = sys.argv[1:]
fsync, calls = os.fsync, 0
def call(descriptor):
    global calls
    calls += 1
    if calls == int(count) and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == int(count):
        raise OSError(errno.ENOSPC, "No space left on device")
    return fsync(descriptor)
os.fsync = call
torch.set_num_threads(1)
cli.main(arguments, prog_name="saml-rec")
"""
# Checkpoints at the start and after the epoch, model, history, metrics, scores, run.json, compare.json, the page: for a
# file and its directory each.
MOMENTS = sorted(np.random.default_rng(0).choice(np.arange(1, 18), 4, replace=False).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("count", MOMENTS)
def test_a_comparison_that_ends_anywhere_goes_on_to_the_same_result(
    small_dataset, python, saml_rec, tmp_path, how, count
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    given = {"models": "shared_bottom", "seeds": 1, "epochs": 1}
    assert saml_rec(*arguments(small_dataset, whole, **given)).exit_code == 0
    ended = python("-c", ENDED, count, how, *arguments(small_dataset, out, **given))
    if how == "kill":
        assert ended.returncode == -9
    else:
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert ended.stderr.startswith(f"error: {out}")
        assert "No space left on device" in ended.stderr
    result = saml_rec(*arguments(small_dataset, out, **given))
    assert result.exit_code == 0, result.output
    records = [read(each) for each in (whole, out)]
    assert records[0]["models"]["shared_bottom"]["overall"] == records[1]["models"]["shared_bottom"]["overall"]
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (whole, out)]
    assert names[0] == names[1]


def test_differences_are_those_of_the_runs_with_errors_of_rows_and_seeds(compared):
    record = read(compared)
    aucs = {}
    for name in record["models"]:
        paths = [compared / "runs" / name / f"seed-{seed}" / "metrics.json" for seed in (0, 1)]
        aucs[name] = [json.loads(path.read_text())["overall"]["auc"] for path in paths]
    (entry,) = [e for e in record["differences"] if e["measure"] == "auc" and e["scenario"] is None]
    assert (entry["first"], entry["second"]) == ("saml", "shared_bottom")
    differences = np.subtract(aucs["saml"], aucs["shared_bottom"])
    assert entry["mean"] == pytest.approx(differences.mean())
    assert entry["seed_standard_error"] == pytest.approx(differences.std(ddof=1) / math.sqrt(2))
    rows, total = entry["row_standard_error"], entry["total_standard_error"]
    assert entry["method"] == "DeLong"
    assert total == pytest.approx(math.hypot(rows, entry["seed_standard_error"]))
    assert entry["interval"] == pytest.approx([entry["mean"] - 1.96 * rows, entry["mean"] + 1.96 * rows], abs=1e-5)
    assert entry["verdict"] == entry["adjusted_verdict"]  # the only pair
    assert (entry["p_value"] < 0.05) == (entry["verdict"] == "differs")
    measures = {(e["measure"], e["scenario"] is None) for e in record["differences"]}
    overall = {"auc", "logloss", "pr_auc", "normalised_entropy", "predicted_over_observed", "ece"}
    assert measures == {(name, True) for name in overall} | {("auc", False), ("logloss", False)}
    losses = [e for e in record["differences"] if e["measure"] == "logloss"]
    assert {e["method"] for e in losses} == {"bootstrap"}
    assert {e["replicates"] for e in losses} == {1000}
    for model in record["models"].values():
        for metric in ("auc", "logloss"):
            low, high = model["overall"][metric]["interval"]
            assert low < model["overall"][metric]["mean"] < high


def test_the_terminal_says_who_is_best(compared, small_dataset, saml_rec, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    lines = saml_rec(*arguments(small_dataset, out)).output.splitlines()
    (best,) = [line for line in lines if line.startswith("By AUC, ")]
    record = read(out)
    aucs = {name: model["overall"]["auc"]["mean"] for name, model in record["models"].items()}
    assert best.startswith(f"By AUC, {max(aucs, key=aucs.get)} is the best network; ")
    assert any(line.startswith("By log loss, ") for line in lines)
    assert any(line.startswith("1 pair of models was tested at 95 %") for line in lines)


@pytest.fixture(scope="module")
def weighted_comparison(weighted_dataset, tmp_path_factory):
    """One seed on rows with weights and groups, whose first scenario is named overall."""
    import polars
    from click.testing import CliRunner

    from saml_rec.cli import main

    folder = tmp_path_factory.mktemp("weighted")
    frame = weighted_dataset.frame.with_columns(country=polars.col("country").replace("de", "overall"))
    frame.write_csv(folder / "data.csv")
    given = ["compare", "--data", folder / "data.csv", "--schema", weighted_dataset.schema, "--out", folder / "out"]
    given += ["--models", "saml,shared_bottom", "--seeds", 1, "--epochs", 1, "--batch-size", 64]
    result = CliRunner().invoke(main, [str(part) for part in given])
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def test_weights_and_groups_of_a_comparison(weighted_comparison):
    out, printed = weighted_comparison
    record = read(out)
    assert "gauc" in record["metrics"]
    table = printed.splitlines()[-10:]
    assert "GAUC" in printed
    assert "One seed: this rests on the test rows alone; another seed may turn it round." in table
    methods = {(e["measure"], e["method"]) for e in record["differences"] if e["scenario"] is None}
    assert {("auc", "bootstrap"), ("gauc", "bootstrap")} <= methods
    for entry in record["differences"]:
        assert entry["seed_standard_error"] is None
        assert entry["total_standard_error"] == entry["row_standard_error"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "GAUC is of the" in page


def test_a_scenario_named_overall_is_not_the_total(weighted_comparison):
    out, _ = weighted_comparison
    record = read(out)
    names = [scenario["name"] for scenario in record["scenarios"]]
    assert names == ["[it]", "fr", "overall"]
    metrics = json.loads((out / "runs/saml/seed-0/metrics.json").read_text(encoding="utf-8"))
    saml = record["models"]["saml"]
    assert saml["overall"]["logloss"]["mean"] == pytest.approx(metrics["overall"]["logloss"])
    assert saml["scenarios"][2]["logloss"]["mean"] == pytest.approx(metrics["scenarios"]["overall"]["logloss"])
    losses = {e["scenario"]: e["mean"] for e in record["differences"] if e["measure"] == "logloss"}
    assert set(losses) == {None, *names}
    assert losses[None] != losses["overall"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"<title>all rows, saml: {saml['overall']['auc']['mean']:.4f}</title>" in page
    assert f"<title>overall, saml: {saml['scenarios'][2]['auc']['mean']:.4f}</title>" in page


@pytest.mark.parametrize("fractions", ["[0.9, 0.1, 0.0]", "[0.9, 0.09, 0.01]"])
def test_few_test_rows_or_none_give_no_verdict(dataset_of, saml_rec, tmp_path, fractions):
    dataset = dataset_of()
    text = dataset.schema.read_text(encoding="utf-8")
    dataset.schema.write_text(f"split = {fractions}\n{text}", encoding="utf-8")
    for _ in range(2):
        result = saml_rec(*arguments(dataset, tmp_path / "out", epochs=1))
        assert result.exit_code == 0, result.output
    record = read(tmp_path / "out")
    assert "auc" not in record["verdicts"] or record["verdicts"]["auc"]["adjusted_differ"] == 0
    assert (tmp_path / "out" / "report.html").exists()


def test_all_models_are_those_whose_packages_are_here(monkeypatch, small_dataset, saml_rec, tmp_path):
    monkeypatch.setattr("saml_rec.models.registry.is_installed", lambda: False)
    for models, named in (("all", False), ("lightgbm", True)):
        given = arguments(small_dataset, tmp_path / "out", models=models)
        result = saml_rec(*given, "--set", "lightgbm.weight_decay=-1")
        assert ("--set lightgbm.weight-decay: lightgbm is not among --models" in result.output) is not named


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
        (
            "saml.depth=3",
            "there is no option 'depth' (options: lr, weight-decay, scenario-rate, scenario-decay, hidden-dims,",
        ),
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
