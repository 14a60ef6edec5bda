"""The seed and the number of examples of the property tests and of the fuzzing targets.

Every run of pytest has a new seed, which ``tests/conftest.py`` chooses, prints and hands to all its processes.

    SAML_FUZZ_SEED=N      the seed of another run
    SAML_FUZZ_FACTOR=X    so many times as many examples
"""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis

SEED = "SAML_FUZZ_SEED"
FACTOR = "SAML_FUZZ_FACTOR"
LONGEST = 120
"""Seconds that an example may take before it counts as a hang."""


def choose_seed() -> None:
    """Chooses the seed of this run unless it is given; processes that are started from here on have the same."""
    os.environ.setdefault(SEED, str(secrets.randbelow(2**32)))


def seed_line() -> str:
    return f"seed of the property tests: {os.environ[SEED]}; repeat with {SEED}={os.environ[SEED]}"


def examples(count: int) -> Callable[[Any], Any]:
    """A test of ``hypothesis.given`` on so many examples of this run's seed."""
    settings = hypothesis.settings(
        max_examples=max(1, round(count * float(os.environ.get(FACTOR, "1")))),
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: hypothesis.seed(int(os.environ[SEED]))(settings(test))


@contextmanager
def no_hang() -> Iterator[None]:
    """Fails a block that does not end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still at work after {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
