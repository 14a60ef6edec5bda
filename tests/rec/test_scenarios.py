"""What becomes of scenarios with few training rows or none: a branch they share, left out, or an error."""

import json

import polars as pl
import pytest
import torch

from saml_rec.data import prepare
from saml_rec.data.encoding import OTHER, Encoder
from saml_rec.data.preparation import scenario_lines
from saml_rec.data.schema import Schema, load_schema
from saml_rec.errors import InputError
from saml_rec.evaluation.scoring import predict
from saml_rec.training import TrainOptions, train

BIG, RARE, NEW = {"a": 200, "b": 150}, {"x1": 9, "x2": 3}, {"new": 4}
SMALL = TrainOptions(epochs=1, batch_size=64, model_options={"hidden_dims": (8, 4)})


def frame_of(train_rows, other_rows):
    rows = [(name, "train") for name, n in train_rows.items() for _ in range(n)]
    rows += [(name, split) for split in ("valid", "test") for name, n in other_rows.items() for _ in range(n)]
    names, splits = zip(*rows, strict=True)
    numbers = range(len(rows))
    return pl.DataFrame(
        {"y": [n * 7 % 5 % 2 for n in numbers], "s": names, "part": splits, "item": [f"i{n % 11}" for n in numbers]}
    )


@pytest.fixture
def data(tmp_path):
    frame = frame_of(BIG | RARE, BIG | RARE | NEW)
    path = tmp_path / "rows.csv"
    frame.sample(fraction=1.0, shuffle=True, seed=1).write_csv(path)
    return path


def schema_of(**scenarios):
    mapping = {
        "label": "y",
        "scenario": "s",
        "split_column": "part",
        "features": {"item": {"kind": "sparse", "dim": 4}},
    }
    return Schema.from_dict(mapping | ({"scenarios": scenarios} if scenarios else {}))


def names_of(table, encoder):
    return pl.Series([encoder.scenario_names[i] for i in table.scenario.tolist()]).value_counts().sort("").rows()


def test_other_is_a_branch_of_the_rare_ones_rows(data):
    found = prepare(data, schema_of(min_rows=10, rare="other", unseen="other"), seed=0)
    assert found.encoder.scenario_names == ("a", "b", OTHER)
    assert dict(names_of(found.tables["train"], found.encoder)) == {**BIG, OTHER: 12}
    assert dict(names_of(found.tables["test"], found.encoder)) == {**BIG, OTHER: 16}
    assert found.encoder.rare == RARE
    assert found.unseen == {"new": 8}
    assert scenario_lines(found) == [
        "scenarios with fewer than 10 training rows (2, 12 rows) share the branch (other): 'x1', 'x2'",
        "scenarios without a training row (1, 8 rows) share the branch (other): 'new'",
    ]


def test_drop_leaves_them_out_everywhere(data, tmp_path):
    found = prepare(data, schema_of(min_rows=10, rare="drop", unseen="drop"), seed=0)
    assert found.encoder.scenario_names == ("a", "b")
    for table in found.tables.values():
        assert dict(names_of(table, found.encoder)) == BIG
    metrics = train(found, found.encoder.schema, SMALL, tmp_path / "run", data_path=data).metrics
    assert metrics["data"]["rows"] == dict.fromkeys(found.tables, 350)
    assert metrics["data"]["unseen_scenarios"] == {"new": 8}
    # A prediction keeps every row of the file.
    scored = predict(tmp_path / "run", data)
    assert scored["prediction"].is_null().to_list() == [name not in BIG for name in scored["s"]]


def test_only_rare_or_only_unseen(data):
    found = prepare(data, schema_of(min_rows=10, rare="other", unseen="drop"), seed=0)
    assert dict(names_of(found.tables["test"], found.encoder)) == {**BIG, OTHER: 12}
    found = prepare(data, schema_of(unseen="drop"), seed=0)
    assert found.encoder.scenario_names == ("a", "b", "x1", "x2")
    assert len(found.tables["test"]) == 362


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, r"has 'new', not among the training rows.*\[scenarios\] unseen = "),
        ({"min_rows": 10, "rare": "refuse"}, r"'x1', 'x2' have fewer than 10 training rows; \[scenarios\] rare = "),
        ({"min_rows": 10}, "has 'new', not among the training rows, whose scenarios are 'a', 'b'"),
        ({"min_rows": 500}, "no scenario has scenarios.min_rows = 500 training rows; the largest has 200"),
        ({"min_rows": 2, "unseen": "other"}, "every scenario has 2 training rows, so that the branch of other"),
    ],
)
def test_refused(data, rule, message):
    with pytest.raises(InputError, match=message):
        prepare(data, schema_of(**rule), seed=0)


def test_the_name_of_the_shared_branch_is_taken(tmp_path):
    frame_of(BIG | RARE | {OTHER: 50}, BIG).write_csv(tmp_path / "rows.csv")
    with pytest.raises(InputError, match=r"has '\(other\)', the name of the branch"):
        prepare(tmp_path / "rows.csv", schema_of(min_rows=10), seed=0)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"min_rows": 0}, "scenarios.min_rows must be a whole number of at least 1, not 0"),
        ({"min_rows": True}, "scenarios.min_rows must be a whole number"),
        ({"rare": "keep"}, "scenarios.rare must be other, drop, refuse, not 'keep'"),
        ({"unseen": 3}, "scenarios.unseen must be other, drop, refuse, not 3"),
        ({"min_row": 5}, r"scenarios: unknown key 'min_row'; did you mean 'min_rows'\?"),
        ({"unseen": "other"}, 'it needs min_rows above 1 and rare = "other"'),
        ({"min_rows": 5, "rare": "drop", "unseen": "other"}, "needs min_rows above 1"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(InputError, match=message):
        schema_of(**rule)


def test_a_schema_without_a_rule_is_written_as_before():
    assert "scenarios" not in schema_of().to_dict()
    rule = schema_of(min_rows=5, rare="drop")
    assert Schema.from_dict(rule.to_dict()) == rule


def test_an_encoder_remembers_where_rows_go(data):
    encoder = prepare(data, schema_of(min_rows=10, unseen="other"), seed=0).encoder
    again = Encoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder
    assert again.scenario_ids(pl.Series(["b", "x2", "never", "a"])).tolist() == [1, 2, 2, 0]


def test_a_long_tail_trains_from_the_command_line(tmp_path, saml_rec):
    tail = {f"t{number}": 1 + number % 5 for number in range(300)}
    frame_of(BIG | tail, BIG | tail | {"later": 2}).write_csv(tmp_path / "rows.csv")
    (tmp_path / "schema.toml").write_text(
        'label = "y"\nscenario = "s"\nsplit_column = "part"\n[scenarios]\nmin_rows = 50\nunseen = "other"\n'
        '[features.item]\nkind = "sparse"\ndim = 4\n',
        encoding="utf-8",
    )
    assert load_schema(tmp_path / "schema.toml").scenarios.min_rows == 50
    out = tmp_path / "run"
    options = ["--data", tmp_path / "rows.csv", "--schema", tmp_path / "schema.toml", "--epochs", 1]
    result = saml_rec("train", "--out", out, "--hidden-dims", "8,4", *options)
    assert result.exit_code == 0, result.stderr
    assert "scenarios with fewer than 50 training rows (300, 900 rows) share the branch (other): 't0'," in result.output
    assert "and 290 more" in result.output
    assert "scenarios without a training row (1, 4 rows) share the branch (other): 'later'" in result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["scenarios"]) == ["a", "b", OTHER]
    weights = torch.load(out / "model.pt")["weights"]
    assert any(tensor.shape[:1] == (3,) for tensor in weights.values())
