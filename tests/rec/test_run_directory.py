import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import platform
import runpy
import shutil
import stat
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import saml_kernels
from saml_rec import run_directory
from saml_rec.data import read_table
from saml_rec.data.learning import Learner
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError, shortened, shown
from saml_rec.evaluation.scoring import predict
from saml_rec.files import check_output_file, leftovers, replacing, temporary_path, write_json
from saml_rec.run_directory import RunDirectory, differences, versions
from saml_rec.sealed import (
    MARK,
    SEAL_BYTES,
    content_of,
    json_digest,
    load,
    read_as_written,
    read_json,
    read_sealed_json,
    require_digest,
    save,
    write_sealed_json,
)

CONTENT = {"weights": {"w": torch.arange(500.0)}, "history": [{"epoch": 1, "valid": {"auc": None}}]}


def write(path, content=b"new"):
    with replacing(path) as file:
        file.write(content)


def test_replacing_writes_and_replaces(tmp_path):
    for content in (b"old", b"new"):
        write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_replacing_leaves_no_trace_of_a_failure(tmp_path, failure):
    write(tmp_path / "file", b"old")

    def fail():
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_replacing_keeps_the_mode_also_while_it_writes(tmp_path, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    with replacing(path) as file:
        (temporary,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(temporary.stat().st_mode) == mode
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_temporary_names_cannot_be_foreseen_and_fit(tmp_path):
    path = tmp_path / ("ö" * 127)
    assert len({temporary_path(path) for _ in range(50)}) == 50
    write(path)
    assert path.read_bytes() == b"new"
    left = temporary_path(path)
    left.touch()
    temporary_path(tmp_path / "other").touch()
    assert leftovers(path) == [left]


def test_a_temporary_name_that_is_taken_is_not_written_to(tmp_path, monkeypatch):
    taken = tmp_path / ".file.0.tmp"
    taken.symlink_to(tmp_path / "victim")
    monkeypatch.setattr("saml_rec.files.temporary_path", lambda path: taken)
    with pytest.raises(FileExistsError):
        write(tmp_path / "file")
    assert not (tmp_path / "victim").exists()


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop: is a symbolic link to itself"):
        check_output_file(tmp_path / "loop")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("größe", "größe"),
        ("a\nb\x1b[3m\udcff", r"a\nb\x1b[3m\udcff"),
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 38 + "..." + "x" * 39),
        ("a" + "\n" * 41, "a" + "\\n" * 18 + "\\..." + "n" + "\\n" * 19),
    ],
)
def test_shortened(text, expected):
    assert shortened(text) == expected
    assert len(shortened(text)) <= 80


def test_shown():
    assert shown("a'b") == '"a\'b"'
    assert len(shown("x" * 10**6)) == len(shown(list(range(1000)))) == 80
    assert shown(16**6000) == "a number of thousands of digits"
    assert shown(torch.zeros(9, 9)).isprintable()


def test_replacing_follows_a_link_and_obeys_the_umask(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_disk_that_refuses_the_bytes_is_an_os_error_and_leaves_no_trace(tmp_path, python):
    program = (
        "import resource, signal, sys, torch; from pathlib import Path; from saml_rec.sealed import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n    save(Path(sys.argv[1]), 'model', {'w': torch.zeros(100000)})\n"
        "except OSError as error:\n    print(error.strerror, error.filename)\n"
    )
    result = python("-c", program, tmp_path / "model.pt")
    assert (result.returncode, result.stdout) == (0, f"File too large {tmp_path / 'model.pt'}\n"), result.stderr
    assert not list(tmp_path.iterdir())


def test_an_os_error_while_torch_writes_is_that_error(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, content):
            if self.tell() + len(content) > 1000:
                raise OSError("No space left on device")
            return super().write(content)

    monkeypatch.setattr("saml_rec.sealed.replacing", lambda _: contextlib.nullcontext(Full()))
    with pytest.raises(OSError, match=r"^No space left on device$"):
        save(tmp_path / "a.pt", "model", CONTENT)


class Unwritable:
    def __reduce__(self):
        raise RuntimeError("this cannot be written")


def test_what_torch_refuses_to_write_is_its_error_and_leaves_the_file(tmp_path):
    path = tmp_path / "a.pt"
    save(path, "model", CONTENT)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="this cannot be written"):
        save(path, "model", {"weights": Unwritable()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict_and_readable(tmp_path):
    write_json(tmp_path / "a.json", {"größe": None})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "größe": null\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"auc": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"größe": None}


def test_output_files_are_checked_before_work(tmp_path):
    check_output_file(tmp_path / "new.csv")
    with pytest.raises(InputError, match="is not a regular file"):
        check_output_file(tmp_path)
    with pytest.raises(InputError, match="is not a regular file"):
        check_output_file(Path("/dev/null"))
    with pytest.raises(InputError, match="does not exist"):
        check_output_file(tmp_path / "missing" / "new.csv")


def test_round_trip(tmp_path):
    save(tmp_path / "a.pt", "model", CONTENT)
    loaded = load(tmp_path / "a.pt", "model")
    assert torch.equal(loaded["weights"]["w"], CONTENT["weights"]["w"])
    assert loaded["history"] == CONTENT["history"]


def test_tensors_come_to_the_cpu_from_wherever_they_were(tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save(tmp_path / "a.pt", "model", CONTENT)
    loaded = load(tmp_path / "a.pt", "model")["weights"]["w"]
    assert loaded.device.type == "cpu"
    assert torch.equal(loaded, CONTENT["weights"]["w"])


@pytest.fixture
def sealed(tmp_path):
    """A small file of a model, and its bytes."""
    save(tmp_path / "a.pt", "model", CONTENT)
    return tmp_path / "a.pt", (tmp_path / "a.pt").read_bytes()


def assert_refused(path, content, match=r"a\.pt: is damaged"):
    path.write_bytes(content)
    with pytest.raises(InputError, match=match) as error:
        load(path, "model")
    assert "\n" not in str(error.value)


def test_a_file_cut_short_anywhere_is_refused(sealed):
    path, good = sealed
    lengths = np.random.default_rng(0).integers(0, len(good), 60)
    for length in {0, 1, len(good) - 1, len(good) - SEAL_BYTES, len(good) - SEAL_BYTES - 1, *map(int, lengths)}:
        assert_refused(path, good[:length])


def test_a_bit_flipped_anywhere_is_refused(sealed):
    path, good = sealed
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    positions = {*range(directory, len(good)), *np.random.default_rng(0).integers(0, directory, 300).tolist()}
    for position in positions:
        assert_refused(path, good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])


def test_torch_alone_takes_damaged_files(sealed):
    """Which is why load compares a digest."""
    path, good = sealed
    content = bytearray(good)
    content[content.index(CONTENT["weights"]["w"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def test_swapped_and_added_content_is_refused(sealed):
    path, good = sealed
    half = len(good) // 2
    other = {**CONTENT, "weights": {"w": torch.ones(500)}}
    save(path, "model", other)
    for content in (good[half:] + good[:half], good + b"\0", good[:-SEAL_BYTES] + path.read_bytes()[-SEAL_BYTES:]):
        assert_refused(path, content)
    for content in (MARK, MARK + b"0" * 64):
        assert_refused(path, content, r"a\.pt: is damaged: its checksum is not that of its content")


def unsealed(path, content):
    """As version 0.1 wrote it."""
    torch.save({"kind": "model", "format": 1, **content}, path)
    return path.read_bytes()


def test_a_file_of_the_earlier_format_is_read_or_refused_but_never_another(tmp_path):
    path = tmp_path / "a.pt"
    content = {"weights": {"a": torch.arange(8.0), "b": torch.arange(8.0) + 100}}
    good = unsealed(path, content)
    assert torch.equal(load(path, "model")["weights"]["b"], content["weights"]["b"])
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    refused = 0
    for position in [*range(directory, len(good)), *range(0, directory, 7)]:
        # Bit 4 of a method of compression makes torch read what is not there, and zipfile nothing.
        for bit in {4, position % 8}:
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            try:
                loaded = load(path, "model")
            except InputError as error:
                refused += 1
                assert str(error).startswith(str(path))  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert all(torch.equal(loaded["weights"][name], content["weights"][name]) for name in "ab")
    assert refused > 500


def test_a_file_of_this_format_without_its_digest_is_refused(sealed):
    path, good = sealed
    without = good[: -SEAL_BYTES - 2] + b"\0\0"
    path.write_bytes(without)
    torch.load(path, weights_only=True)
    assert_refused(path, without, "it has no checksum at its end")


def test_zip_programs_and_torch_read_the_file(sealed):
    path, good = sealed
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"saml-rec sha256 " + hashlib.sha256(good[:-SEAL_BYTES]).hexdigest().encode()
    assert torch.equal(torch.load(path, weights_only=True)["weights"]["w"], CONTENT["weights"]["w"])


def sealed_archive(path, entries, **options):
    """A file with a digest that somebody made of other entries."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.comment = MARK + b"0" * 64
    body = path.read_bytes()[:-SEAL_BYTES]
    path.write_bytes(body + MARK + hashlib.sha256(body).hexdigest().encode())


def test_a_file_that_grows_when_unpacked_is_refused_before(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    monkeypatch.setattr(torch, "load", pytest.fail)
    sealed_archive(path, {"a/data.pkl": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED)
    size = path.stat().st_size
    assert size < 10**5
    with pytest.raises(InputError, match=rf"a\.pt: .*: in {size:,} bytes its part 'a/data\.pkl' would have 10000000$"):
        load(path, "model")
    # Several names for the same bytes.
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(10**4))
        archive.filelist += [copy.copy(archive.filelist[0]) for _ in range(3)]
        archive._didModify = True
    with pytest.raises(InputError, match=r"would have 10000$"):
        load(path, "model")


@pytest.mark.parametrize("changed", [{"file_size": 101}, {"compress_type": zipfile.ZIP_DEFLATED}])
def test_a_file_whose_directory_says_that_a_part_grows_is_refused(tmp_path, monkeypatch, changed):
    path = tmp_path / "a.pt"
    monkeypatch.setattr(torch, "load", pytest.fail)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(100))
        (entry,) = archive.filelist
        for name, value in changed.items():
            setattr(entry, name, value)
    with pytest.raises(InputError, match=rf"its part 'a/data\.pkl' would have {changed.get('file_size', 100)}$"):
        load(path, "model")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (MemoryError(), InputError, r"^not enough memory for reading .*a\.pt: the system has none left$"),
        (RuntimeError("bad_alloc"), InputError, r"^not enough memory for reading .*a\.pt: bad_alloc$"),
        (OSError("Input/output error"), OSError, "^Input/output error$"),
        (RuntimeError("no such tensor"), InputError, r"a\.pt: is damaged or was not written by saml-rec$"),
    ],
)
def test_what_keeps_a_file_from_being_read_is_not_taken_for_damage(sealed, monkeypatch, raised, expected, message):
    def refuse(*_, **__):
        raise raised

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(expected, match=message):
        load(sealed[0], "model")


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (OSError("disk"), OSError, "^disk$"),
        (MemoryError("none"), MemoryError, "^none$"),
        (RuntimeError("CUDA out of memory"), RuntimeError, "^CUDA out of memory$"),
        (InputError("its schema is none"), InputError, r"^a\.pt: its schema is none$"),
        (KeyError("w"), InputError, r"^a\.pt: its parts do not fit together: KeyError: 'w'$"),
        (
            RuntimeError("Error(s) in loading state_dict for M:\n\tsizes of w:\n\t2, expected 3.\n\tNo b."),
            InputError,
            r"^a\.pt: its parts do not fit together: RuntimeError: sizes of w: 2, expected 3\. No b\.$",
        ),
    ],
)
def test_what_is_made_of_a_file_and_fails_is_an_error_of_the_file(raised, expected, message):
    with pytest.raises(expected, match=message), content_of(Path("a.pt")):
        raise raised


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_neither_written_nor_read(tmp_path, number):
    path = tmp_path / "a.pt"
    broken = {"optimizer": [{"step": torch.tensor(1), "exp_avg": torch.tensor([0.0, number])}]}
    save(path, "model", CONTENT)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"a\.pt: not written, optimizer\.0\.exp_avg has numbers that are not finite"):
        save(path, "model", broken)
    assert path.read_bytes() == before
    unsealed(path, broken)
    with pytest.raises(InputError, match=r"a\.pt: optimizer\.0\.exp_avg has numbers that are not finite"):
        load(path, "model")


SEALED_JSON = {"größe": 0.1, "list": [1, {"a": None}], "name": "\udcff"}


def test_sealed_json_round_trip_and_damage(tmp_path):
    path = tmp_path / "a.json"
    write_sealed_json(path, SEALED_JSON)
    assert read_sealed_json(path) == SEALED_JSON
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1 << bit]) + good[position + 1 :])
            try:
                # A bit of the space between two parts may make another space of it.
                assert read_sealed_json(path) == SEALED_JSON
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert len(str(error)) < len(str(path)) + 150  # noqa: PT017
    for length in range(len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(InputError, match=r"a\.json: is damaged"):
            read_sealed_json(path)


def test_the_checksum_is_of_the_content_with_sorted_keys(tmp_path):
    path = tmp_path / "a.json"
    content = {"b": 1, "a": {"d": 2, "c": 3}}
    write_sealed_json(path, content)
    digest = hashlib.sha256(b'{"a": {"c": 3, "d": 2}, "b": 1}').hexdigest()
    assert json.loads(path.read_bytes()) == {**content, "checksum": digest}
    write_json(path, {"checksum": digest, "a": {"c": 3, "d": 2}, "b": 1})
    assert read_sealed_json(path) == content
    for without in (content, {**content, "checksul": digest}):
        write_json(path, without)
        with pytest.raises(
            InputError, match=r"a\.json: is damaged or was not written by saml-rec: it has no checksum$"
        ):
            read_sealed_json(path)


def test_json_whose_digest_is_kept_elsewhere(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, SEALED_JSON)
    assert json_digest(SEALED_JSON) == hashlib.sha256(path.read_bytes()).hexdigest()
    for digest in (json_digest(SEALED_JSON), None):
        assert read_as_written(path, digest) == SEALED_JSON
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match=r"a\.json: is damaged: it is not as it was written"):
        read_as_written(path, json_digest(SEALED_JSON))
    assert read_as_written(path, None) == SEALED_JSON
    path.write_bytes(b"{")
    with pytest.raises(InputError, match=r"a\.json: is damaged: Expecting property name"):
        read_as_written(path, None)


@pytest.mark.parametrize("content", [b"", b"x", b"xy"])
def test_a_digest_is_of_every_byte(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    require_digest(path, hashlib.sha256(content).hexdigest())
    with pytest.raises(InputError, match="a: is damaged: it is not as it was written"):
        require_digest(path, hashlib.sha256(content + b"x").hexdigest())


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '{"a": ' + "9" * 6000 + "}", "\xff", "{} {}"])
def test_json_of_something_else(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json: is damaged"):
        read_sealed_json(path)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: load(path, "model"),
        read_json,
        read_sealed_json,
        load_schema,
        lambda path: require_digest(path, "0"),
        lambda path: read_as_written(path, None),
    ],
)
def test_a_named_pipe_is_refused_before_it_is_opened(tmp_path, read, monkeypatch):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for place in (Path, io):
        monkeypatch.setattr(place, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(InputError, match="pipe: is a named pipe; expected a regular file"):
        read(path)


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_loading_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Of those who do not say what they want torch makes what this says.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"kind": "model", "format": 1, "weights": Attack()}, "a.pt")
    with pytest.raises(InputError, match="is damaged or was not written by saml-rec"):
        load(Path("a.pt"), "model")
    assert not Path("attacked").exists()


@pytest.mark.parametrize("content", [{"kind": "checkpoint", "format": 1}, {}, ["kind"]])
def test_file_of_another_kind(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match="is not a model file of saml-rec"):
        load(tmp_path / "a.pt", "model")


def test_files_that_are_no_torch_files(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello", "world")
    for content in (b"text", pickle.dumps({}), buffer.getvalue()):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(InputError, match="is damaged or was not written by saml-rec"):
            load(tmp_path / "a.pt", "model")


def test_format_of_another_version(tmp_path):
    torch.save({"kind": "model", "format": 99}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="has format 99, this version reads format 1"):
        load(tmp_path / "a.pt", "model")


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    """A lock belongs to what opened the directory, so that one process can have two."""
    pytest.importorskip("fcntl", reason="this system has no such lock")
    run = RunDirectory(tmp_path / "deep" / "run")
    for _ in range(2):
        with run.held():
            with pytest.raises(InputError, match="deep/run: another process is training here"), run.held():
                pass
            # The one that was refused has not let go of it.
            with pytest.raises(InputError, match="another process is training here"), run.held():
                pass
    assert not list(run.path.iterdir())


def test_a_directory_without_locks_is_held_by_all(tmp_path, monkeypatch):
    class NoLocks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise OSError("Function not implemented")

    for module in (NoLocks, None):
        monkeypatch.setattr(run_directory, "fcntl", module)
        run = RunDirectory(tmp_path / str(module))
        with run.held(), run.held():
            assert run.path.is_dir()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    # A copy, so that the module itself counts as what runs at import.
    assert runpy.run_path(shutil.copy(run_directory.__file__, tmp_path))["fcntl"] is None


@pytest.mark.parametrize("found", [torch.zeros(0), torch.ones(2), True, "2", [2]])
def test_a_format_that_is_no_number(tmp_path, found):
    torch.save({"kind": "model", "format": found}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"has format .*, this version reads format 1") as error:
        load(tmp_path / "a.pt", "model")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "changes",
    [{"csv": {"separator": True, "decimal": None}}, {"csv": 3}, {"features": {"train": {"age": {"empty": "all"}}}}],
)
def test_parts_of_a_model_that_scoring_cannot_use(tmp_path, finished_run, small_dataset, changes):
    run = RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))
    save(run.model, "model", run.load_model() | changes)
    with pytest.raises(InputError, match=r"model\.pt: "):
        predict(run.path, small_dataset.data)


def test_tensors_are_weights_only(tmp_path, finished_run, small_dataset):
    run = RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))
    content = run.load_model()
    options = content["options"]
    forged = options | {"model_options": options["model_options"] | {"stop_gradient": torch.zeros(0)}}
    save(run.model, "model", content | {"options": forged})
    with pytest.raises(InputError, match=r"model\.pt: is damaged: options\.model_options\.stop_gradient is a tensor"):
        predict(run.path, small_dataset.data)


def test_the_schemas_of_a_model_are_one(tmp_path, finished_run, small_dataset):
    run = RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))
    content = run.load_model()
    features = {name: each for name, each in content["schema"]["features"].items() if each["kind"] != "dense"}
    save(run.model, "model", content | {"schema": content["schema"] | {"features": features}})
    with pytest.raises(InputError, match=r"model\.pt: its schema is not that of its encoder"):
        predict(run.path, small_dataset.data)


@pytest.mark.parametrize("results", [None, ["history.json"], {"history.json": 3}])
def test_digests_that_are_none(tmp_path, finished_run, results):
    run = RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))
    with pytest.raises(InputError, match=r"model\.pt: is damaged: expected the digests of the run's results"):
        run.read_results({"results": results})


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"scenario_names": ["de", []]}, "'scenario_names' must hold texts only"),
        ({"rare": {3: 1}}, "'rare' must hold texts only"),
        ({"vocabularies": {}}, "holds nothing of '"),
        ({"moments": {}}, "holds nothing of '"),
        ({"moments": {"age": [0.0, "1"]}}, "'age' must hold two finite numbers"),
    ],
)
def test_encoders_that_hold_something_else(tmp_path, finished_run, small_dataset, encoder, message):
    run = RunDirectory(shutil.copytree(finished_run, tmp_path / "run"))
    content = run.load_model()
    save(run.model, "model", content | {"encoder": content["encoder"] | encoder})
    with pytest.raises(InputError, match=message):
        predict(run.path, small_dataset.data)


PARTS = {"options": {}, "schema": {}, "data": {}, "weights": {"w": torch.ones(2)}}
MODEL = PARTS | {"encoder": {}, "best_epoch": 1}
CHECKPOINT = PARTS | {"best_weights": {}, "optimizer": {}, "history": []}


@pytest.mark.parametrize(("kind", "content"), [("model", MODEL), ("checkpoint", CHECKPOINT)])
def test_the_parts_of_a_model_and_of_a_checkpoint(tmp_path, kind, content):
    run = RunDirectory(tmp_path)
    read = run.load_model if kind == "model" else run.load_checkpoint
    path = tmp_path / f"{kind}.pt"
    save(path, kind, content)
    assert differences(read(), {"kind": kind, "format": 2} | content) == []
    for name in content:
        save(path, kind, content | {name: "x"})
        with pytest.raises(InputError, match=rf"{kind}\.pt: is damaged: its part {name} is 'x'$"):
            read()
        save(path, kind, {other: part for other, part in content.items() if other != name})
        with pytest.raises(InputError, match=rf"{kind}\.pt: is damaged: its part {name} is None$"):
            read()


HISTORY = [{"epoch": 1}, {"epoch": 2}]
METRICS = {"overall": {}, "scenarios": {}, "best_epoch": 1, "epochs": 2}


def test_results_are_read_as_they_were_written(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_configuration({"größe": [1, 2], "model": "saml"})
    assert tomllib.loads((tmp_path / "run.toml").read_text(encoding="utf-8")) == {"größe": [1, 2], "model": "saml"}
    run.write_results(HISTORY, METRICS, "# größe \udcff\n")
    assert (tmp_path / "model_card.md").read_bytes() == "# größe \\udcff\n".encode()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digests = run.digests_of_results(HISTORY, METRICS) | {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    for saved in ({}, {"results": {}}, {"results": digests}):
        assert run.read_results(saved) == (HISTORY, METRICS)
    for name in ("history.json", "metrics.json", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + b"\n")
        assert run.read_results({}) == (HISTORY, METRICS)
        with pytest.raises(InputError, match=rf"{name}: is damaged: it is not as it was written"):
            run.read_results({"results": digests})
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize("history", [3, {}, {"epoch": 1}, [], [1], [{"epoch": 1}, 3]])
def test_a_history_that_is_none(tmp_path, history):
    run = RunDirectory(tmp_path)
    run.write_results(history, METRICS, "")
    with pytest.raises(InputError, match=r"history\.json: is damaged: expected a list of epochs"):
        run.read_results({})


@pytest.mark.parametrize("metrics", [3, [], {}, *({k: v for k, v in METRICS.items() if k != name} for name in METRICS)])
def test_metrics_that_are_none(tmp_path, metrics):
    run = RunDirectory(tmp_path)
    run.write_results(HISTORY, metrics, "")
    with pytest.raises(InputError, match=r"metrics\.json: is damaged: expected an object with overall, scenarios and"):
        run.read_results({})


OWN = ("checkpoint.pt", "run.toml", "model.safetensors", "model.pt", "history.json", "model_card.md", "metrics.json")
BESIDE = ("evaluation-test.json", "run.json", "test-logits.npy")


def test_clear_removes_only_what_a_run_wrote(tmp_path):
    run = RunDirectory(tmp_path)
    temporary = [temporary_path(tmp_path / name).name for name in (*OWN, *BESIDE)]
    for name in (*OWN, *BESIDE, *temporary, "notes.txt"):
        (tmp_path / name).touch()
    run.clear()
    assert {file.name for file in tmp_path.iterdir()} == {"run.json", "test-logits.npy", "notes.txt"}


def test_clear_makes_a_directory(tmp_path):
    RunDirectory(tmp_path / "deep" / "run").clear()
    assert (tmp_path / "deep" / "run").is_dir()


def test_leftovers_are_removed_and_nothing_else(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    temporary = [temporary_path(tmp_path / name) for name in (*OWN, *BESIDE)]
    for file in (*temporary, run.model, tmp_path / ".notes.txt.0.tmp"):
        file.touch()
    run.remove_leftovers()
    assert {file.name for file in tmp_path.iterdir()} == {"model.pt", ".notes.txt.0.tmp"}
    # Somebody else may have removed them in the meantime.
    monkeypatch.setattr(run_directory, "leftovers", lambda file: [temporary[0]])
    run.remove_leftovers()


def test_the_versions_that_results_depend_on():
    assert versions() == {
        "saml_kernels": saml_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "polars": version("polars"),
        "scikit-learn": version("scikit-learn"),
    }
    assert {type(each) for each in versions().values()} == {str}


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ([], {"resume": True}, "holds no run to resume"),
        (["checkpoint.pt"], {}, "holds an unfinished run; resume it, overwrite it or choose another directory"),
        (["model.pt"], {}, "holds an unfinished run"),
        (["checkpoint.pt", "metrics.json"], {}, "holds an unfinished run"),
        (["checkpoint.pt", "model.pt", "metrics.json"], {}, "holds a finished run"),
        (["thesis.tex"], {}, "is not empty and holds no run"),
        (["thesis.tex"], {"overwrite": True}, "is not empty and holds no run"),
        (["checkpoint.pt"], {"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_directories_that_training_must_not_write_to(tmp_path, files, flags, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=message):
        RunDirectory(tmp_path).require_startable(**{"resume": False, "overwrite": False, **flags})


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").touch()
    for resume in (True, False):
        with pytest.raises(InputError, match="run: is not a directory"):
            RunDirectory(tmp_path / "run").require_startable(resume=resume, overwrite=False)


def test_directories_that_training_may_write_to(tmp_path):
    RunDirectory(tmp_path / "missing").require_startable(resume=False, overwrite=False)
    run = RunDirectory(tmp_path)
    run.require_startable(resume=False, overwrite=True)
    temporary_path(run.model).touch()
    run.require_startable(resume=False, overwrite=False)
    for file in (run.checkpoint, tmp_path / "thesis.tex"):
        file.touch()
    run.require_startable(resume=True, overwrite=False)
    run.require_startable(resume=False, overwrite=True)


def test_fingerprint_is_of_the_rows_not_of_the_file(tmp_path, dataset_of):
    dataset = dataset_of()
    schema = load_schema(dataset.schema)
    frame = read_table(dataset.data, schema)
    table = Learner(schema).add(frame).encoder().encode(frame)
    dataset.frame.drop("price").write_parquet(tmp_path / "clicks.parquet")
    again = read_table(tmp_path / "clicks.parquet", schema)
    assert table.fingerprint() == Learner(schema).add(again).encoder().encode(again).fingerprint()

    label, ids = table.label.clone(), table.sparse["user"].clone()
    label[7] = 1 - label[7]
    ids[3] += 1
    reversed_rows = Learner(schema).add(frame).encoder().encode(frame.reverse())
    changed = [
        dataclasses.replace(table, label=label),
        dataclasses.replace(table, label=None),
        dataclasses.replace(table, sparse={**table.sparse, "user": ids}),
        reversed_rows,
    ]
    assert len({other.fingerprint() for other in (table, *changed)}) == 5


def test_differences_name_the_leaves():
    before = {"lr": 0.1, "features": {"age": {"dim": 8}}, "dims": [8, 4], "gone": 1, "same": [1, {"a": 2}]}
    now = {"lr": 0.2, "features": {"age": {"dim": 4}}, "dims": [8, 2], "same": [1, {"a": 2}]}
    assert differences(before, now) == [
        "dims[1] was 4, is 2",
        "features.age.dim was 8, is 4",
        "gone was 1, is None",
        "lr was 0.1, is 0.2",
    ]
    a, b = torch.zeros(0), torch.ones(2, 2)
    assert differences({"x": a, "y": b}, {"x": a.clone(), "y": b.clone()}) == []
    assert [each.isprintable() for each in differences({"x": a, "y": b}, {"x": 1, "y": b + 1})] == [True, True]
    for one, other in ((torch.ones(1), 1), (1, torch.ones(1))):
        assert differences({"x": one}, {"x": other}) == [f"x was {shown(one)}, is {shown(other)}"]
    assert differences([1, 2], [1], "dims") == ["dims was [1, 2], is [1]"]
    assert differences({"a": {"b": 1}, "c": 2}, {"a": 3, "c": {"d": 4}}) == [
        "a was {'b': 1}, is 3",
        "c was 2, is {'d': 4}",
    ]
    assert differences({"a": [1], "c": 2}, {"a": 3, "c": [4]}) == ["a was [1], is 3", "c was 2, is [4]"]
    assert differences({10: 1, "9": 1}, {10: 2, "9": 2}) == ["10 was 1, is 2", "9 was 1, is 2"]
