"""Times the trunk on every backend."""

from pathlib import Path

import click

from saml_rec.cli.options import (
    FILE,
    device_option,
)
from saml_rec.errors import InputError
from saml_rec.models.hyperparameters import Finite, IntegerList, Whole


@click.command()
@click.option("--rows", type=Whole(1), default=4096, show_default=True, help="Rows of the batch.")
@click.option("--scenarios", type=Whole(1), default=8, show_default=True, help="Scenarios, a branch each.")
@click.option("--local-dim", type=Whole(0), default=256, show_default=True, help="Width of the branches' input.")
@click.option("--global-dim", type=Whole(0), default=256, show_default=True, help="Width of the shared input.")
@click.option(
    "--hidden",
    type=IntegerList(),
    default="512,256,128",
    show_default=True,
    help="Widths of the layers, of branches and auxiliary network.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@device_option
@click.option(
    "--budget",
    type=Finite(min=0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds of measuring; at least five rounds are measured.",
)
@click.option("--tune", is_flag=True, help="Find the fastest Triton tiles for the shape and keep them in the cache.")
@click.option("--out", type=FILE, help="A JSON file for the figures.")
def bench(
    rows: int,
    scenarios: int,
    local_dim: int,
    global_dim: int,
    hidden: tuple[int, ...],
    dtype: str,
    device: str,
    budget: float,
    tune: bool,
    out: Path | None,
) -> None:
    """Time the trunk, all branches with a mutual unit, on every backend that runs here."""
    from saml_kernels.backends.triton.tuning import Shape
    from saml_rec import bench
    from saml_rec.console import say, stdout
    from saml_rec.files import check_output_file, write_json
    from saml_rec.models.construction import resolve_device

    if not hidden:
        raise InputError("--hidden: expected at least one layer, got none")
    if out is not None:
        check_output_file(out)
    shape = Shape(rows, scenarios, local_dim, global_dim, hidden, bench.DTYPES[dtype], resolve_device(device))
    console = stdout()
    if tune:
        bench.require_tunable(shape)
        found, record = bench.tune(shape, budget, lambda line: say(console, line))
        bench.say_tuned(console, found)
    else:
        record = bench.measure(shape, budget)
        bench.say_results(console, record)
    if out is not None:
        write_json(out, record)
        say(console, f"wrote {out}")
