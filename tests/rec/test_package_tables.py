"""Ratings of lectures and films as rows, without their source."""

import hashlib
import io
import tarfile
import tomllib
from collections import Counter

import pytest

pytest.importorskip("polars")

import package_tables
from saml_rec import Schema
from saml_rec.datasets.packaged import PackagedFiles

LECTURES = """"","s","d","studage","lectage","service","dept","y"
"1","1","1002","2","2","0","2",5
"2","1","1050","8","1","1","6",3
"3","12","1582","2","6","0","2",4
"4","12","1582","2","6","0","15",1
"""
GENRES = ",".join(package_tables.GENRES)
FILMS = f""""","title","year","length","budget","rating","votes","mpaa",{GENRES}
"1","$",1971,121,NA,6.4,348,"",0,0,1,1,0,0,0
"2","A, B",1899,3,NA,6.1,20,"",0,0,0,0,0,0,0
"3","C",2000,1100,1000,6.2,45,"PG-13",1,0,0,0,0,0,1
"""


def test_lectures():
    table = package_tables.lectures_table(LECTURES.encode())
    assert table.drop("split").rows(named=True)[0] == {
        "label": 1,
        "department": 2,
        "student": 1,
        "lecturer": 1002,
        "semester": 2,
        "semesters_ago": 2,
        "service": 0,
    }
    assert table["label"].to_list() == [1, 0, 1, 0]  # "good" begins at 4
    assert table["department"].to_list() == [2, 6, 2, 15]


def test_films():
    table = package_tables.films_table(FILMS.encode())
    assert table["label"].to_list() == [1, 0, 1]  # the median itself is not above it
    assert table["decade"].to_list() == [1970, 1890, 2000]
    assert table["genres"].to_list() == ["Comedy|Drama", "", "Action|Short"]
    assert table["length"].to_list() == [120, 0, 200]
    assert table["audience"].to_list() == [None, None, "PG-13"]
    assert not {"rating", "votes", "title", "budget"} & set(table.columns), "what is known before it is seen"


@pytest.mark.parametrize(
    ("table", "schema"),
    [
        (package_tables.lectures_table(LECTURES.encode()), package_tables.LECTURES),
        (package_tables.films_table(FILMS.encode()), package_tables.FILMS),
    ],
    ids=["lectures", "films"],
)
def test_the_schema_names_columns_of_the_table(table, schema):
    read = Schema.from_dict(tomllib.loads(schema), source="schema")
    features = {feature.name for feature in read.features}
    assert {read.label, read.scenario, read.split_column, read.group, *features} == set(table.columns)


def test_rows_are_drawn_one_by_one():
    rows = [f'"{n}","{n}","7","2","2","0","2",5' for n in range(1000)]
    table = package_tables.lectures_table("\n".join([LECTURES.splitlines()[0], *rows]).encode())
    assert Counter(table["split"].to_list()) == {"train": 500, "valid": 100, "test": 400}
    # Not a part of them in a row: of every hundred about half.
    trained = [table["split"].to_list()[start : start + 100].count("train") for start in range(0, 1000, 100)]
    assert all(30 < count < 70 for count in trained), trained


@pytest.mark.parametrize(("name", "write"), [("lectures", "write_lectures"), ("films", "write_films")])
def test_the_table_comes_out_of_the_archive_in_the_archive(tmp_path, monkeypatch, name, write):
    inner = io.BytesIO()
    contents = {"lme4/InstEval.csv": LECTURES, "ggplot2/movies.csv": FILMS}
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for path, text in contents.items():
            member = tarfile.TarInfo(f"resources/rdata/csv/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    packed = inner.getvalue()
    known = {"resources.tar.gz": hashlib.sha256(packed).hexdigest()}
    monkeypatch.setattr(package_tables, "SOURCE", PackagedFiles("tables", "tables==1", "source", "tables", known))
    monkeypatch.setenv("SAML_REC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "tables").mkdir(parents=True)
    (tmp_path / "cache" / "tables" / "resources.tar.gz").write_bytes(packed)
    data_path, schema_path = getattr(package_tables, write)(tmp_path / "out")
    assert (data_path.name, schema_path.name) == (f"{name}.csv", f"{name}.toml")
    assert len(data_path.read_text(encoding="utf-8").splitlines()) == len(
        {"lectures": LECTURES, "films": FILMS}[name].splitlines()
    )
