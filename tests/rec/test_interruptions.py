"""Comparisons, searches and timings that are killed, that find the disk full, or whose earlier results are damaged."""

import copy
import errno
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from saml_rec.comparison.compare import _kept_addition
from saml_rec.errors import InputError
from saml_rec.files import write_json
from saml_rec.sealed import write_sealed_json
from saml_rec.tuning import search

pytest.importorskip("optuna", reason="the extra saml-kernels[tune] is not installed")

BENCH = ("bench", "--rows", 20, "--scenarios", 3, "--local-dim", 5, "--global-dim", 4, "--hidden", "6,4")
BENCH += ("--device", "cpu", "--budget", 0.01)
FILES = {"compare": "compare.json", "tune": "tune.json"}
# As saml-rec with one thread; says when it begins.
ONE_THREAD = """
import sys, torch
from saml_rec import cli
torch.set_num_threads(1)
print("ready", flush=True)
cli.main(sys.argv[1:], prog_name="saml-rec")
"""
# As saml-rec, and is killed before its synchronisation number COUNT.
KILLED = """
import os, signal, sys
from saml_rec import cli
count, *arguments = sys.argv[1:]
fsync, calls = os.fsync, 0
def call(descriptor):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return fsync(descriptor)
os.fsync = call
cli.main(arguments, prog_name="saml-rec")
"""
# As saml-rec, with files of 200 bytes at most.
LIMITED = """
import resource, signal, sys
from saml_rec import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
cli.main(sys.argv[1:], prog_name="saml-rec")
"""
# What a clock or the operating system decides.
MEASURED = ("seconds", "peak_bytes", "rows_per_second", "checksum")


def command(name, dataset, out, models="shared_bottom", size=2):
    """Two seeds or trials of each model unless said otherwise."""
    given = [name, "--data", dataset.data, "--schema", dataset.schema, "--out", out, "--models", models]
    given += ["--seeds" if name == "compare" else "--trials", size, "--epochs", 1, "--batch-size", 64]
    return [str(each) for each in given]


def without_measured(content):
    if isinstance(content, dict):
        return {key: without_measured(value) for key, value in content.items() if key not in MEASURED}
    return [without_measured(each) for each in content] if isinstance(content, list) else content


def result(name, out):
    """What a command came to: its record, and the scores of every run."""
    record = json.loads((out / FILES[name]).read_text(encoding="utf-8"))
    scores = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("test-logits.npy")}
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    return without_measured(record), scores, names


def assert_one_line(done, start, *parts):
    code = done.exit_code if hasattr(done, "exit_code") else done.returncode
    assert (code, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {start}")
    assert all(part in done.stderr for part in parts), done.stderr


@pytest.fixture(scope="module")
def whole(small_dataset, tmp_path_factory):
    """By command what it leaves without an interruption, and what it comes to. Do not write to it: copy it."""
    from click.testing import CliRunner

    from saml_rec.cli import main

    outs = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in FILES:
        outs[name] = tmp_path_factory.mktemp("whole") / name
        done = CliRunner().invoke(main, command(name, small_dataset, outs[name]))
        assert done.exit_code == 0, done.output
    torch.set_num_threads(threads)
    return outs


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_what_a_process_says_after_ready_is_not_lost(started):
    child = started("-c", "print('ready\\nmore')")
    assert child.communicate(timeout=240)[0] == b"more\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_killed_at_random_moments_it_goes_on_to_the_same_result(small_dataset, whole, tmp_path, started, name):
    def start(out):
        return started("-c", ONE_THREAD, *command(name, small_dataset, out))

    out, draw = tmp_path / "out", np.random.default_rng()
    begun = time.perf_counter()
    child = start(tmp_path / "timed")
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors.decode()
    longest, delays = time.perf_counter() - begun, []
    for _ in range(5):
        delays.append(draw.uniform(0, longest / 2))
        child = start(out)
        time.sleep(delays[-1])
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for path in out.rglob("*.json") if out.exists() else ():
            if not path.name.startswith("."):
                json.loads(path.read_text(encoding="utf-8"))
    child = start(out)
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 0, errors.decode()
    assert result(name, out) == result(name, whole[name]), delays


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "count"), [*(("tune", count) for count in range(1, 5)), ("compare", 0)])
def test_a_full_disk_ends_in_one_line_and_the_command_goes_on(
    small_dataset, saml_rec, whole, tmp_path, monkeypatch, name, count
):
    out, fsync, calls = tmp_path / "out", os.fsync, []
    # Of a file and of its directory; a comparison has more than a search, of which one is drawn.
    count = count or int(np.random.default_rng().integers(1, 33))

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == count:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_one_line(saml_rec(*command(name, small_dataset, out)), out, "No space left on device")
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]
    if name == "tune" and count > 1:
        assert len(json.loads((out / "tune.json").read_text())["models"]["shared_bottom"]["trials"]) == count // 2
    done = saml_rec(*command(name, small_dataset, out))
    assert done.exit_code == 0, done.output
    assert result(name, out) == result(name, whole[name]), count


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("name", [*FILES, "bench", "evaluate"])
def test_files_that_the_system_refuses_to_let_grow(small_dataset, python, whole, finished_run, tmp_path, name):
    out = tmp_path / "out"
    if name in FILES:
        shutil.copytree(whole[name], out)
        given = command(name, small_dataset, out, size=3)
    elif name == "bench":
        out.mkdir()
        (out / "bench.json").write_text("earlier")
        given = [*BENCH, "--out", out / "bench.json"]
    else:
        shutil.copytree(finished_run, out)
        given = ["evaluate", out]
    before = contents(out)
    assert_one_line(python("-c", LIMITED, *given), out, "File too large")
    assert contents(out) == before


def test_a_full_disk_in_bench_leaves_the_earlier_file(saml_rec, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    out.write_text("earlier")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_one_line(saml_rec(*BENCH, "--out", out), f"{out}: No space left on device")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("bench.json", "earlier")]


@pytest.mark.parametrize("count", [1, 2])
def test_killed_bench_leaves_the_earlier_file_or_the_new_one(python, tmp_path, count):
    """At the synchronisation of the file, before it has its name, and of the directory, after."""
    out = tmp_path / "bench.json"
    out.write_text("earlier")
    assert python("-c", KILLED, count, *BENCH, "--out", out).returncode == -signal.SIGKILL
    if count == 1:
        assert out.read_text() == "earlier"
        # Nobody takes the rest for a result.
        assert all(path.name.startswith(".bench.json.") for path in set(tmp_path.iterdir()) - {out})
    else:
        assert json.loads(out.read_text())["backends"]
        assert list(tmp_path.iterdir()) == [out]


def flipped(content):
    position = int(np.random.default_rng().integers(len(content)))
    return content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :]


def other_types(content):
    """The object with every value, at any depth, replaced by one of another type."""

    def variants(value):
        yield from ("text" if not isinstance(value, str) else 7, [value], {"key": value})
        if isinstance(value, dict):
            for key, part in value.items():
                yield {other: each for other, each in value.items() if other != key}
                yield from ({**value, key: variant} for variant in variants(part))
        elif isinstance(value, list) and value:
            yield from ([variant, *value[1:]] for variant in variants(value[0]))

    record = json.loads(content)
    record.pop("checksum")
    return list(variants(record))


DAMAGES = {
    "nothing": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "a bit": flipped,
    "a list": lambda content: b"[]",
    "a number": lambda content: b"17",
    "another object": lambda content: b'{"version": 2, "results": []}',
    "twice": lambda content: content + content,
}
PARTS = [("compare", f"runs/shared_bottom/seed-0/{name}.json") for name in ("history", "metrics", "run")]
PARTS += [("compare", "compare.json"), ("tune", "tune.json")]
FORMS = [("compare", "runs/saml/seed-0/run.json"), ("tune", "tune.json")]


def assert_made_again_or_refused(done, name, out, path, whole):
    """Never another result, and never a traceback."""
    if done.exit_code == 0:
        assert result(name, out) == result(name, whole)
    else:
        assert_one_line(done, path)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "file"), PARTS)
def test_damaged_partial_results_are_made_again_or_refused_by_name(
    small_dataset, saml_rec, whole, tmp_path, name, file
):
    out = tmp_path / "out"
    shutil.copytree(whole[name], out)
    good, kept = (out / file).read_bytes(), contents(out)
    for damage, change in DAMAGES.items():
        bad = change(good)
        (out / file).write_bytes(bad)
        done = saml_rec(*command(name, small_dataset, out))
        assert_made_again_or_refused(done, name, out, out / file, whole[name])
        # A file of a comparison is made from the runs each time, and run.json again; what took hours is left.
        refused = Path(file).name in ("history.json", "metrics.json", "tune.json")
        if refused and damage != "a bit":
            assert done.exit_code == 2, damage
            assert (out / file).read_bytes() == bad
        for path, content in kept.items():
            path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "file"), FORMS)
def test_partial_results_of_another_form(small_dataset, saml_rec, tmp_path, name, file):
    """With the checksum of what they hold: that is looked at all the same."""
    out = tmp_path / "out"
    assert saml_rec(*command(name, small_dataset, out, "saml")).exit_code == 0
    good, kept = (out / file).read_bytes(), contents(out)
    for content in other_types(good):
        (write_sealed_json if isinstance(content, dict) else write_json)(out / file, content)
        done = saml_rec(*command(name, small_dataset, out, "saml", size=3 if name == "tune" else 2))
        if name == "compare":
            assert done.exit_code == 0, (content, done.output)
            assert f"{out / file}: is damaged" in done.stdout or content.keys() > {"peak_bytes"}
        elif done.exit_code:
            assert_one_line(done, out / file)
        for path, before in kept.items():
            path.write_bytes(before)


@pytest.mark.parametrize(
    "change",
    [
        {"peak_bytes": "many"},
        {"mutual_weights": {}},
        {"mutual_weights": {"2": [[0.5] * 3] * 3}},
        {"mutual_weights": {"1": [[0.5] * 4] * 4}},
        {"mutual_weights": {"1": [[0.5] * 3, None, [0.5] * 3]}},
        {"mutual_weights": {"1": [[0.5, "x", 0.5]] * 3}},
    ],
)
def test_what_is_kept_of_a_run_has_its_form(tmp_path, change):
    path, console = tmp_path / "run.json", Console(file=io.StringIO(), width=200)
    good = {"peak_bytes": None, "mutual_weights": {"1": [[0.5, None, 0.5]] * 3}}
    write_sealed_json(path, good)
    assert _kept_addition(path, 3, (1,), console) == good
    write_sealed_json(path, good | change)
    assert _kept_addition(path, 3, (1,), console) is None
    assert console.file.getvalue() == f"{path}: is damaged: expected mutual_weights and peak_bytes; making it again\n"


FORMS_OF_TRIALS = {
    "a number": (lambda trial: trial.update(number=0), "expected trials of saml"),
    "no seconds": (lambda trial: trial.pop("seconds"), "expected trials of saml"),
    "a loss that is text": (lambda trial: trial.update(valid_logloss="0.6"), "expected trials of saml"),
    "a loss of a failure": (lambda trial: trial.update(error="failed"), "expected trials of saml"),
    "options that are a list": (lambda trial: trial.update(options=[1]), "expected trials of saml"),
    "an option too many": (
        lambda trial: trial["options"].update(depth=3),
        "expected options of saml within .* in trial 2",
    ),
    "an option beyond": (
        lambda trial: trial["options"].update(dropout=0.7),
        "expected options of saml within .* in trial 2",
    ),
    "text for a number": (
        lambda trial: trial["options"].update(dropout="0.1"),
        "expected options of saml within .* trial 2",
    ),
    "truth for a number": (
        lambda trial: trial["options"].update(dropout=True),
        "expected options of saml within .* trial 2",
    ),
    "no choice": (
        lambda trial: trial["options"].update(hidden_dims=[5]),
        "expected options of saml within .* in trial 2",
    ),
}


@pytest.mark.parametrize("form", FORMS_OF_TRIALS)
def test_trials_of_a_search_have_their_form(tmp_path, form):
    change, message = FORMS_OF_TRIALS[form]
    path = tmp_path / "tune.json"
    options = {"dropout": 0.0, "hidden_dims": [64, 32]}
    trial = {"options": options, "seconds": 1.5, **dict.fromkeys(search.OUTCOME), "valid_logloss": 0.5}
    space = {"dropout": {"low": 0.0, "high": 0.5, "log": False}, "hidden_dims": {"choices": ["64,32", "none"]}}
    trials = [{**copy.deepcopy(trial), "number": number} for number in range(2)]
    record = {"seed": 0, "trials": 2, "options": {}, "schema": {}, "data": dict.fromkeys(("train", "valid", "test"))}
    record["models"] = {"saml": {"space": space, "trials": trials, "best": 1}}
    write_sealed_json(path, record)
    assert search.read_tuning(path) == record
    change(trials[1])
    write_sealed_json(path, record)
    with pytest.raises(InputError, match=f"tune.json: is damaged: {message}"):
        search.read_tuning(path)
