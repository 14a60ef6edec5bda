"""A group of commands whose errors of input are one line."""

import errno
from typing import Any

import click

from saml_rec.errors import InputError

INPUT_ERROR_STATUS = 2
INTERRUPT_STATUS = 130


class Commands(click.Group):
    """Commands whose errors of input are one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # The reader of a pipe is gone; click ends quietly.
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPT_STATUS)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        ctx.exit(INPUT_ERROR_STATUS)
