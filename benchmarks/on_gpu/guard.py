"""Runs a command, and ends everything that it started once it is over.

    python guard.py PARENT COMMAND...

It is over when the command ends, when this process is told to end (SIGTERM, SIGINT, SIGHUP), and when process PARENT,
which started this one, dies. A child of the command that left its process group and session, as daemons and workers of
other tools do, is found all the same: as a subreaper (Linux) this process becomes the parent of every orphan below it.
Exits as the command did. Standard library only, so that it starts at once.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

PARENT_DEATH_SIGNAL, CHILD_SUBREAPER = 1, 36
"""Options of prctl."""
END_SECONDS: Final = 10.0
"""What a driver holds may take so long to end; what is there then is left and named."""
TOLD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Told(BaseException):
    """To end."""


def main(parent: int, command: Sequence[str]) -> int:
    """The command's exit status, as subprocess has it."""

    def tell(number: int, _: Any) -> NoReturn:
        raise Told(number)

    for number in TOLD:
        signal.signal(number, tell)
    control(CHILD_SUBREAPER, 1)
    control(PARENT_DEATH_SIGNAL, signal.SIGTERM)
    status = 128 + signal.SIGTERM
    try:
        # Whether it died before it could be watched.
        if os.getppid() == parent:
            status = run(command)
    except Told as told:
        status = 128 + told.args[0]
    finally:
        for number in TOLD:
            signal.signal(number, signal.SIG_IGN)
        if left := end_descendants(END_SECONDS):
            print(f"guard: processes {', '.join(map(str, left))} do not end", file=sys.stderr)
    return status


def run(command: Sequence[str]) -> int:
    """Starts the command and waits for it, and meanwhile for orphans that end."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_guard)
    except OSError as error:
        print(f"guard: {command[0]}: {error}", file=sys.stderr)
        return 127
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            return os.waitstatus_to_exitcode(status)


def _die_with_guard() -> None:
    control(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def control(option: int, value: int) -> None:
    """prctl, where there is one."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_descendants(seconds: float) -> list[int]:
    """Kills every process below this one, again until there is none; those that are left after so many seconds."""
    deadline = time.monotonic() + seconds
    while left := descendants(os.getpid()):
        if time.monotonic() > deadline:
            return left
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    return []


def descendants(ancestor: int) -> list[int]:
    """Processes below one, itself left out, by /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        # The name, in parentheses, may hold anything.
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found: list[int] = []
    waiting = [ancestor]
    while waiting:
        below = children.pop(waiting.pop(), [])
        found += below
        waiting += below
    return found


def exit_as(status: int) -> NoReturn:
    """Ends this process with the status, or by the signal, that ended another."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    exit_as(main(int(sys.argv[1]), sys.argv[2:]))
