"""What this machine can run."""

import click


@click.command()
def doctor() -> None:
    """Show what this machine can run, and why not the rest."""
    import saml_kernels.doctor

    click.echo(saml_kernels.doctor.report())
