"""Writes a model for serving without Python."""

from pathlib import Path

import click

from saml_rec.cli.options import FILE, backend_option


@click.command()
@click.argument("run", type=FILE)
@click.option("--out", type=FILE, required=True, help="A .pt2 file; the others get its name.")
@backend_option
def export(run: Path, out: Path, backend: str | None) -> None:
    """Write the model of RUN for a C++ process: compiled, with its encoder and a manifest beside it."""
    from saml_rec.console import say, stdout
    from saml_rec.export import export as write

    console = stdout()
    manifest = write(run, out, backend=backend, console=console)
    names = ", ".join(file["name"] for file in manifest["files"].values())
    say(console, f"wrote {names} and {out.with_suffix('.json').name} to {out.parent}")
