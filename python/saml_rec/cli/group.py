"""A group of commands whose errors of input are one line."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from saml_rec.errors import InputError, escaped, is_out_of_memory, shortened

INPUT_ERROR_STATUS = 2
INTERRUPT_STATUS = 130
CLOSED_PIPE_STATUS = 141
"""What a shell reports of a program that SIGPIPE ended."""
LONG_DATA = re.compile(r"'(?:[^'\\]|\\.){81,}'|\"(?:[^\"\\]|\\.){81,}\"|\S{81,}")
"""What a usage message quotes, or a word of it, where that is longer than messages are."""


class Commands(click.Group):
    """Commands whose errors of input are one line."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        # Help and version are printed here.
        with _one_line(lambda: "saml-rec"):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(lambda: f"saml-rec {ctx.invoked_subcommand}"):
            result = super().invoke(ctx)
            # What is left in a buffer fails now, or when nobody can say so any more.
            if sys.stdout is not None:
                sys.stdout.flush()
            return result


@contextlib.contextmanager
def _one_line(work: Callable[[], str]) -> Iterator[None]:
    """Ends in one line of error and an exit status for what the user, the system or the reader of the output does."""
    _print_anything()
    try:
        with _short_usage_errors():
            yield
        return
    except InputError as error:
        message = str(error)
    except OSError as error:
        if error.errno == errno.EPIPE:
            _leave_stdout()
            raise click.exceptions.Exit(CLOSED_PIPE_STATUS) from None
        reason = error.strerror or str(error)
        message = f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason
        _flush_or_leave_stdout()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = f"not enough memory for {work()}"
        message += f": {shortened(str(error).splitlines()[0])}" if str(error) else ""
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(INTERRUPT_STATUS) from None
    click.echo(f"error: {escaped(' '.join(message.split()))}", err=True)
    raise click.exceptions.Exit(INPUT_ERROR_STATUS)


@contextlib.contextmanager
def _short_usage_errors() -> Iterator[None]:
    """What click says of an argument quotes no more of it than other messages do."""
    try:
        yield
    except click.UsageError as error:
        lines = LONG_DATA.sub(lambda found: shortened(found[0]), error.format_message()).split("\n")
        message = "\n".join("\t".join(map(escaped, line.split("\t"))) for line in lines)
        raise click.UsageError(message, error.ctx) from None


def _print_anything() -> None:
    """Characters that the terminal's encoding lacks, and bytes of file names that are no text, are printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_leave_stdout() -> None:
    """Where stdout is what failed, Python would try again when it ends, and end with another status for it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _leave_stdout()


def _leave_stdout() -> None:
    """Nobody reads it any more: what Python still has for it goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
