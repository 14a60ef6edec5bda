"""saml-rec bench without a GPU: the table, the JSON, what it refuses."""

import json

import pytest
import torch

from saml_kernels.backends import BACKENDS, available_backends
from saml_kernels.backends.triton import availability
from saml_kernels.testing import timing
from saml_kernels.testing.problem import Problem
from saml_rec import bench

SMALL = ("--rows", 20, "--scenarios", 3, "--local-dim", 5, "--global-dim", 4, "--hidden", "6,4", "--device", "cpu")
QUICK = (*SMALL, "--budget", 0.05)
PRESENT = [name for name in ("cpp", "reference") if available_backends()[name] is None]

needs_no_triton = pytest.mark.skipif(
    availability.device_reason("cpu") is None, reason="Triton's interpreter would run on the CPU"
)


def test_every_backend_is_a_row_or_has_a_reason(saml_rec):
    result = saml_rec("bench", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("20 rows, 3 scenarios, inputs 5 + 4, layers 6,4, float32 on cpu\n")
    for name in BACKENDS:
        listed = f"\n{name} " if name in PRESENT else f"\nnot timed: {name}: "
        assert listed in result.stdout
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("reference "))
    assert row.split().count("1.00") == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_file(saml_rec, tmp_path, dtype):
    out = tmp_path / "bench.json"
    result = saml_rec("bench", *QUICK, "--dtype", dtype, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.stdout
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["shape"] == {
        "rows": 20,
        "scenarios": 3,
        "local_dim": 5,
        "global_dim": 4,
        "hidden_dims": [6, 4],
        "dtype": dtype,
        "device": "cpu",
    }
    assert record["machine"]["torch"] == record["versions"]["torch"] == str(torch.__version__)
    assert record["backends"].keys() == set(BACKENDS)
    for figures in (record["backends"]["reference"][name] for name in bench.PASSES):
        seconds = figures["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert seconds["rounds"] >= timing.Protocol.min_rounds
        assert figures["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0, "rounds": seconds["rounds"]}


def test_a_backend_that_fails_keeps_its_reason(saml_rec, monkeypatch):
    if "cpp" not in PRESENT:
        pytest.skip("the extension is not built")
    original = Problem.run

    def run(self, backend):
        if backend == "cpp" and torch.is_grad_enabled():  # The step.
            raise torch.OutOfMemoryError("no room\nfor this")
        return original(self, backend=backend)

    monkeypatch.setattr(Problem, "run", run)
    result = saml_rec("bench", *QUICK)
    assert result.exit_code == 0, result.output
    assert "not timed: cpp: OutOfMemoryError: no room\n" in result.stdout


def test_contenders_take_turns(monkeypatch):
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = timing.interleave(calls, timing.Protocol(1e-9), lambda call, repeats: call() or 1.0)
    assert seconds == dict.fromkeys("abc", [1.0] * timing.Protocol.min_rounds)
    # After a call each that decides how often it is repeated.
    assert "".join(ran[3:]) == "abccbabcaacbcab"


@needs_no_triton
def test_tune_without_a_gpu_is_refused_before_any_work(saml_rec, monkeypatch, tmp_path):
    cache = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("SAML_KERNELS_TUNED", str(cache))
    monkeypatch.setattr(bench.Shape, "problem", pytest.fail)
    result = saml_rec("bench", *SMALL, "--tune")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: --tune: backend 'triton' cannot run multi_branch: ")
    assert result.stderr.count("\n") == 1
    assert not cache.parent.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", 3), "No such option"),
        (("--dtype", "float64"), "float64"),
        (("--rows", 0), "--rows"),
        (("--scenarios", 0), "--scenarios"),
        (("--budget", 0), "--budget"),
        (("--hidden", "6,-4"), "--hidden"),
        (("--hidden", "none"), "error: --hidden: expected at least one layer"),
        (("--device", "nowhere"), "error: device 'nowhere' cannot be used here"),
        (("--out", "missing/bench.json"), "does not exist"),
    ],
)
def test_refused(saml_rec, options, message):
    result = saml_rec("bench", *QUICK, *options)
    assert result.exit_code == 2
    assert message in result.stderr
