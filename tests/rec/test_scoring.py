import csv
import io
import json
import shutil

import polars
import pytest

from saml_rec.data import prepare
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import evaluate, load_trained, predict
from saml_rec.sealed import load, save
from saml_rec.training.loop import TrainOptions, train


def test_evaluation_of_a_split_repeats_the_measures_of_training(finished_run):
    trained = json.loads((finished_run / "metrics.json").read_text(encoding="utf-8"))
    for split, expected in (("test", trained), ("valid", {"overall": trained["valid"]})):
        measured = evaluate(finished_run, split=split)
        assert measured["split"] == split
        assert {name: measured[name] for name in expected if name in ("overall", "scenarios")} == {
            name: expected[name] for name in expected if name in ("overall", "scenarios")
        }


def test_evaluation_of_a_whole_file(finished_run, small_dataset):
    measured = evaluate(finished_run, data_path=small_dataset.data)
    assert measured["split"] is None
    assert measured["overall"]["rows"] == 400


def test_evaluation_of_a_scenario_with_one_class(finished_run, dataset_of, small_dataset):
    frame = small_dataset.frame.filter((polars.col("country") != "de") | (polars.col("click") == 1))
    frame = frame.filter(polars.col("country") != "fr")
    measured = evaluate(finished_run, data_path=dataset_of(frame).data)["scenarios"]
    assert measured["de"]["auc"] is None
    assert measured["de"]["logloss"] > 0
    assert measured["fr"].pop("rows") == 0
    assert set(measured["fr"].values()) == {None}


def test_evaluation_refuses_rows_that_training_did_not_have(finished_run, small_dataset, dataset_of):
    dataset = dataset_of(small_dataset.frame.head(399))
    with pytest.raises(InputError, match="its test rows are not those that"):
        evaluate(finished_run, data_path=dataset.data, split="test")


def test_moved_training_file(small_dataset, tmp_path):
    moved, run = tmp_path / "moved.csv", tmp_path / "run"
    shutil.copy(small_dataset.data, moved)
    schema = load_schema(small_dataset.schema)
    options = TrainOptions(epochs=1, batch_size=64, model_options={"hidden_dims": (8, 4)})
    metrics = train(prepare(moved, schema, seed=0), schema, options, run, data_path=moved).metrics
    shutil.move(moved, tmp_path / "elsewhere.csv")
    with pytest.raises(InputError, match="was trained on is gone; name it with --data and --split"):
        evaluate(run)
    assert evaluate(run, data_path=tmp_path / "elsewhere.csv", split="test")["overall"] == metrics["overall"]


def test_prediction_does_not_depend_on_other_rows_or_the_label(finished_run, small_dataset, dataset_of):
    whole = predict(finished_run, small_dataset.data)
    assert whole.columns == [*small_dataset.frame.columns, "prediction"]
    assert whole["prediction"].is_between(0, 1).all()
    assert whole["prediction"].n_unique() > 100
    few = small_dataset.frame.drop("click").gather([17, 3, 250])
    again = predict(finished_run, dataset_of(few).data)
    assert again["prediction"].to_list() == pytest.approx(whole["prediction"].gather([17, 3, 250]).to_list(), rel=1e-5)


def test_prediction_leaves_the_cells_of_a_csv_file_alone(finished_run, tmp_path):
    header = ["click", "user", "item", "age", "country", "tags", "history", "note", "empty"]
    rows = [
        ["maybe", "u1", "007", "5", "de", "", "i1|i2", ' a, "b"\nc ', ""],
        ["1", "u2", "i3", " 5.50", "[it]", "t1||t2", "", "1e3", ""],
        ["", "", "NA", "", "fr", "null", "i9", "Größe 名 \N{GRINNING FACE}", ""],
    ]
    path = tmp_path / "new.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    written = predict(finished_run, path).write_csv()
    first, *others = csv.reader(io.StringIO(written))
    assert first == [*header, "prediction"]
    assert [row[:-1] for row in others] == rows
    assert all(0 < float(row[-1]) < 1 for row in others)


def test_prediction_leaves_the_columns_of_a_parquet_file_alone(finished_run, tmp_path):
    frame = polars.DataFrame(
        {
            "user": polars.Series([3, None, 2**40]),
            "item": polars.Series([1.0, 2.0, None]),
            "age": polars.Series([5, 6, None], dtype=polars.Int8),
            "country": polars.Series(["de", "fr", "de"], dtype=polars.Categorical),
            "tags": [["t1", None], [], None],
            "history": [[1, 2], [], [3]],
            "click": [True, False, None],
            "more": [{"x": 1}, {"x": 2}, None],
        }
    )
    path = tmp_path / "new.parquet"
    frame.write_parquet(path)
    predicted = predict(finished_run, path)
    assert predicted.drop("prediction").schema == frame.schema
    assert predicted.drop("prediction").equals(frame)
    assert predicted["prediction"].is_between(0, 1).all()


def test_prediction_refuses_a_table_with_predictions(finished_run, small_dataset, dataset_of):
    dataset = dataset_of(small_dataset.frame.with_columns(prediction=0.5))
    with pytest.raises(InputError, match="already has a column 'prediction'"):
        predict(finished_run, dataset.data)


def test_unfinished_and_missing_runs_cannot_score(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(InputError, match="holds an unfinished run; finish it with train --resume"):
        load_trained(run)
    with pytest.raises(InputError, match="holds no run"):
        load_trained(tmp_path / "nothing")


def test_a_model_older_than_a_hyperparameter_is_built_as_it_was(small_dataset, tmp_path):
    schema, run = load_schema(small_dataset.schema), tmp_path / "run"
    options = TrainOptions(epochs=1, batch_size=64, model_options={"hidden_dims": (8, 4), "scenario_dim": 0})
    train(prepare(small_dataset.data, schema, seed=0), schema, options, run)
    expected = predict(run, small_dataset.data)
    content = load(run / "model.pt", "model")
    del content["options"]["model_options"]["scenario_dim"]
    save(run / "model.pt", "model", content)
    assert predict(run, small_dataset.data).equals(expected)


def test_a_scenario_named_overall_is_not_the_total(small_dataset, dataset_of, saml_rec, tmp_path):
    renamed = small_dataset.frame.with_columns(country=polars.col("country").replace("de", "overall"))
    dataset, run = dataset_of(renamed), tmp_path / "run"
    given = ["--data", dataset.data, "--schema", dataset.schema, "--out", run, "--epochs", 1, "--hidden-dims", "8,4"]
    for command in (["train", *given], ["evaluate", run]):
        result = saml_rec(*command)
        assert result.exit_code == 0, result.output
        # The last number of a line is its rows.
        rows = {line.split("  ")[0]: line.split()[-1] for line in result.output.splitlines() if line[-1:].isdigit()}
        assert rows["all rows"] == "40"
        assert 0 < int(rows["overall"]) < 40
    for file in ("metrics.json", "evaluation-test.json"):
        metrics = json.loads((run / file).read_text(encoding="utf-8"))
        assert list(metrics["scenarios"]) == ["[it]", "fr", "overall"]
        assert metrics["overall"]["rows"] == 40 > metrics["scenarios"]["overall"]["rows"] > 0
        assert metrics["overall"]["logloss"] != metrics["scenarios"]["overall"]["logloss"]
