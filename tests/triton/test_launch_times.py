"""The GPU benchmark's section on every launch, in Triton's interpreter: which there are, and their products.

TRITON_INTERPRET=1 pytest -m interpreter tests/triton/test_launch_times.py
"""

import dataclasses
import time

import pytest
import torch

import workload
from on_gpu import launch_times, smoke, trials
from on_gpu.recording import recording
from on_gpu.run import DRY_SHAPES, Run
from on_gpu.target import Target
from saml_kernels.backends.triton import availability, configs, launch
from saml_kernels.testing.problem import backend, make

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not availability.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]

RUN = Run(Target(dry_run=True), compiled=False)
CELL = RUN.shapes.cell(24, 2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """What the interpreter takes in any case."""
    monkeypatch.setattr(launch_times, "_built_in", lambda run, cell: configs.choice(1, 1, 1, None, None))


def test_every_launch_is_timed(monkeypatch):
    monkeypatch.setattr(trials, "run", lambda first, wanted, run, deadline: dict.fromkeys(wanted, "wrong: by far"))
    monkeypatch.setattr(Run, "shapes", dataclasses.replace(DRY_SHAPES, timed=((24, 2),)))
    found = {}
    launch_times.launches_timed(RUN, time.monotonic() + 300, found.update)
    persistent, per_layer = found["cells"]
    backward = ["persistent_kernel", "weight_gradient_kernel"]
    for cell, parts in ((persistent, ["forward"]), (per_layer, ["forward", "layer", "forward"])):
        names = {kind: [row["name"] for row in cell["launches"] if row["pass"] == kind] for kind in launch_times.PASSES}
        assert names == {"forward": ["persistent_kernel"] * len(parts), "backward": backward}
        assert [row["part"] for row in cell["launches"]] == [*parts, "backward", "weights"]
        operations = {
            kind: sum(
                2 * product["batch"] * product["m"] * product["k"] * product["n"]
                for row in cell["launches"]
                if row["pass"] == kind
                for product in row["products"]
            )
            for kind in launch_times.PASSES
        }
        # The formulas count the scores besides, which are no products.
        M, d = CELL.M, CELL.hidden_dims[0]
        counted = workload.operations(CELL)
        assert operations["forward"] == counted.forward - CELL.B * (2 * (2 * M - 1) * d + 2 * (M - 1) * d)
        assert operations["backward"] == counted.backward - CELL.B * 4 * (M - 1) * d
        for row in cell["launches"]:
            assert row["ratio"] == pytest.approx(row["torch_seconds"] / row["median"])
            assert row["tflops"] < row["torch_tflops"]
    assert per_layer["launches"][1]["stages"] == ["V0 Layer"]
    (variation,) = found["variations"]
    assert variation["failure"] == "wrong: by far"


def test_a_recorded_launch_may_be_made_again():
    problem = RUN.problem(CELL)
    leaves = [tensor for _, tensor in problem.named()]
    made = []
    with recording(made):
        outputs = tuple(problem.run(backend="triton", schedule="per_layer")[:2])
        gradients = torch.autograd.grad(outputs, leaves, problem.cotangents)
    assert [each.number for each in made] == list(range(5))
    written = [tensor.clone() for tensor in (*outputs, *gradients)]
    for tensor in (*outputs, *gradients):
        tensor.detach().fill_(torch.nan)
    for each in made:
        each.again()
        each.again()
    assert all(torch.equal(a, b) for a, b in zip(written, (*outputs, *gradients), strict=True))


def test_a_trial_and_a_form_of_the_smoke_test():
    found = {}
    choice = dataclasses.asdict(configs.choice(1, 1, 1, None, None))
    trials.trial(dataclasses.replace(RUN, argument={"M": 2, "choice": choice}), time.monotonic() + 300, found.update)
    assert found == {"failure": None}
    assert smoke._failure(RUN.target, smoke.Form("float32", "persistent"), smoke.DRY) is None


@pytest.mark.parametrize("programs", smoke.PROGRAMS)
def test_the_smoke_test_has_work_for_all_programs(programs, monkeypatch):
    """With the tiles of a GPU; nothing is computed."""
    grids = []
    monkeypatch.setattr(launch, "start", lambda kernel, grid, *_, **options: grids.append((kernel.fn.__name__, grid)))
    problem = make(smoke.REPEATED).to(torch.bfloat16).leaves()
    with smoke._programs(programs):
        problem.call("step", backend("triton"))()
    assert [grid for name, grid in grids if name == "persistent_kernel"] == [(programs,)] * 2
