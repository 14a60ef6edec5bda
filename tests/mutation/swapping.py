"""Mutants of functions meet their tests in a process that has imported everything already.

A mutant that differs in the code of functions only needs no import of its module: the functions that there are get the
other code. One that changes what a module or a class does when it is made needs one.
"""

import contextlib
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType

import pytest

NEEDS_IMPORT = 77
"""Status of a process that could not swap the code."""
OF_A_FUNCTION = 0x1
"""The flag CO_OPTIMIZED, which bodies of modules and classes do not have."""

Swap = tuple[tuple[str, int], CodeType]
"""A function, by its qualified name and first line, and its code."""


def swaps_between(text: str, mutated: str, name: str) -> list[Swap] | None:
    """The functions of a file whose code a mutant changes; None where it changes more."""
    return _differences(compile(text, name, "exec"), compile(mutated, name, "exec"))


def _differences(before: CodeType, after: CodeType) -> list[Swap] | None:
    if before.co_flags & OF_A_FUNCTION:
        return [] if _behaviour(before) == _behaviour(after) else [((before.co_qualname, before.co_firstlineno), after)]
    if (before.co_code, before.co_names, _plain(before)) != (after.co_code, after.co_names, _plain(after)):
        return None
    found: list[Swap] = []
    for old, new in zip(_nested(before), _nested(after), strict=True):
        if (more := _differences(old, new)) is None:
            return None
        found += more
    return found


def _nested(code: CodeType) -> list[CodeType]:
    return [each for each in code.co_consts if isinstance(each, CodeType)]


def _plain(code: CodeType) -> list[str]:
    """Constants with their types: 1 is not True."""
    return ["code" if isinstance(each, CodeType) else f"{type(each).__name__} {each!r}" for each in code.co_consts]


def _behaviour(code: CodeType) -> tuple[object, ...]:
    """What a function does, wherever it stands."""
    nested = [_behaviour(each) for each in _nested(code)]
    return (code.co_code, code.co_names, code.co_varnames, code.co_flags, code.co_exceptiontable, _plain(code), nested)


def functions_of(module: str) -> dict[tuple[str, int], list[FunctionType]]:
    """All functions of a module that exist, also in classes and below decorators."""
    found: dict[tuple[str, int], list[FunctionType]] = {}
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and each.__module__ == module:
            code = each.__code__
            found.setdefault((code.co_qualname, code.co_firstlineno), []).append(each)
    return found


class Swapping:
    """A pytest plugin: in place of running what was collected, it runs some of it for every mutant, in a fork.

    Args:
        module: name of the mutated module.
        mutants: what to do before a fork, which tests to run in it, in order, for so many seconds, and the swaps.
        answer: called with True for a mutant that survives, False for one that does not, None for one that needs an
            import.
    """

    def __init__(
        self,
        module: str,
        mutants: Iterator[tuple[Sequence[str], float, list[Swap] | None]],
        answer: Callable[[bool | None], None],
    ) -> None:
        self.module, self.mutants, self.answer = module, mutants, answer
        self.parent = os.getpid()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        functions = functions_of(self.module)
        # Threads do not survive a fork; what waits for them would wait for ever.
        is_alone = len(list(Path("/proc/self/task").iterdir())) == 1
        for tests, seconds, swaps in self.mutants:
            if not is_alone or swaps is None or any(place not in functions for place, _ in swaps):
                self.answer(None)
                continue
            child = os.fork()
            if child == 0:
                limit_processor(seconds / 3)
                self._run(functions, swaps, [items[test] for test in tests])
            status = wait_for(child, seconds)
            self.answer(None if status == NEEDS_IMPORT else status == 0)
        return True

    def _run(self, functions, swaps: Sequence[Swap], items: Sequence[pytest.Item]) -> None:
        status = 1
        try:
            os.setsid()
            try:
                for place, code in swaps:
                    for function in functions[place]:
                        function.__code__ = code
            except ValueError:
                # Other variables of the function around it.
                os._exit(NEEDS_IMPORT)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            status = 0
        finally:
            os._exit(status)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and os.getpid() != self.parent:
            os._exit(1)


def limit_processor(seconds: float) -> None:
    """Ends this process after so many seconds of the processor's, whatever else runs on the machine."""
    used = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used, used))


def wait_for(child: int, seconds: float) -> int:
    """The exit status of a process, 124 if it takes longer; what it started ends with it."""
    end, status = time.monotonic() + seconds, None
    while status is None and time.monotonic() < end:
        done, found = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(found)
        else:
            time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
        return 124
    return status


def forget_compiled(file: Path) -> None:
    """Python takes compiled code of the same second and length for that of a file."""
    for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
        cached.unlink()
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
