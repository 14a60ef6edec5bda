"""Hypothesis profiles and the process-wide switches that tests turn on and must turn off again."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from cpp_runs import CAPABILITIES, VARIABLE

# One profile for everybody bounds the time; CI also draws the same examples on every run.
_bounded = hypothesis.settings(max_examples=60, deadline=None, print_blob=True)
hypothesis.settings.register_profile("local", _bounded)
hypothesis.settings.register_profile("ci", _bounded, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """torch.empty hands out NaN, in C++ too: memory that is read before it is written shows."""
    # Filling is on by default, but only while deterministic algorithms are asked for.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The instruction set of the CPU kernels that the test runs on: each of this machine's."""
    monkeypatch.setenv(VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def keep_num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
