"""The command saml-rec. Commands import what they need when they run, so that help appears at once.

What the user got wrong, and what the operating system refuses, ends in one line ``error: ...`` on stderr and
exit status 2; an interrupt ends in status 130.
"""

import os

import click

from saml_rec.cli.bench import bench
from saml_rec.cli.compare import compare
from saml_rec.cli.data import data
from saml_rec.cli.doctor import doctor
from saml_rec.cli.evaluate import evaluate
from saml_rec.cli.export import export
from saml_rec.cli.group import Commands
from saml_rec.cli.predict import predict
from saml_rec.cli.train import train
from saml_rec.cli.tune import tune
from saml_rec.errors import InputError


def print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import saml_kernels

        click.echo(f"saml-rec {saml_kernels.__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Train and use recommenders for several scenarios at once."""
    # Read by OpenMP when torch is loaded. By default threads spin while they wait for each other: on two cores that
    # another program used too, training took 25 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if ctx.invoked_subcommand != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{ctx.invoked_subcommand} runs in one process; start it without torchrun")


for command in (train, tune, compare, evaluate, predict, export, data, bench, doctor):
    main.add_command(command)
