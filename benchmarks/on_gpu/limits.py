"""A pytest plugin: the fixture ``time_limit``, under which a test on a GPU ends its process rather than hang.

A kernel that does not return cannot be interrupted from Python. Past its limit a test's process prints where every
thread stands and exits; pytest-xdist then reports the test and gives the others to a new worker. A process whose GPU
no longer works after a test ends as well, so that only that test fails.
"""

import contextlib
import faulthandler
import functools
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, Final

import pytest

VARIABLE: Final = "SAML_KERNELS_TEST_SECONDS"
SECONDS: Final = 120.0
"""For one test: compiling its kernels beside other processes takes most of it."""


def seconds() -> float:
    """That a test may take."""
    return float(os.environ.get(VARIABLE, SECONDS))


@pytest.fixture
def time_limit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the process of a test that takes too long, or after which the GPU does not work."""
    file = _terminal(request.config)
    faulthandler.dump_traceback_later(seconds(), exit=True, file=file)
    yield
    try:
        _wait_for_the_device()
    except RuntimeError as error:
        # pytest-xdist starts another worker for the tests that this one leaves.
        if hasattr(request.config, "workerinput"):
            print(f"{request.node.nodeid}: the GPU does not work any more: {error}", file=file, flush=True)
            os._exit(1)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def _wait_for_the_device() -> None:
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@functools.cache
def _terminal(config: pytest.Config) -> IO[str]:
    """Standard error as it was before pytest began to capture it."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        return os.fdopen(os.dup(2), "w")
