"""What the launches of a training step would take on an H100, as a model of their schedule predicts it.

    python benchmarks/gpu_model.py                 writes results/gpu_model.json and the tables of docs/gpu-model.md
    python benchmarks/gpu_model.py --render        the tables from the committed result

Nothing is measured. The model takes counts of machine instructions from results/gpu_assembly.json, which
``python tests/triton/costs.py`` writes, and everything else from on_gpu/chip.py. docs/gpu-model.md explains it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import click

import page
import records
from on_gpu import model, model_page
from on_gpu.assembly import AssemblyError, load
from on_gpu.chip import H100, PEER

ASSEMBLY: Final = records.RESULTS / "gpu_assembly.json"
RESULT: Final = records.RESULTS / "gpu_model.json"
PAGE: Final = page.DOCS / "gpu-model.md"


def predicted(assembly_file: Path) -> dict[str, Any]:
    """The record.

    Raises:
        click.ClickException: the file of counts lacks something.
    """
    try:
        assembly = load(assembly_file, model.needed(model.ROWS, model.SCENARIOS))
    except AssemblyError as error:
        raise click.ClickException(str(error)) from None
    record = records.head()
    del record["columns"]
    batches = [(B, M, name) for B in model.ROWS for M in model.SCENARIOS for name in model.DISTRIBUTIONS]
    return record | {
        "kind": model.KIND,
        "assembly": assembly.head,
        "chip": dataclasses.asdict(H100),
        "peer": dataclasses.asdict(PEER),
        "cells": [model.cell(assembly, H100, PEER, *batch) for batch in batches],
        "sensitivity": [each for B, M in model.SENSITIVE for each in model.sensitivity(assembly, H100, PEER, B, M)],
    }


def render(record: dict[str, Any], path: Path) -> None:
    """Fills the page's tables."""
    path.write_text(page.fill(path.read_text(encoding="utf-8"), model_page.texts(record)), encoding="utf-8")


@click.command(help=(__doc__ or "").split("\n", maxsplit=1)[0])
@click.option("--assembly", type=click.Path(path_type=Path), default=ASSEMBLY, help="Counts of machine code.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULT, help="The record.")
@click.option("--page", "path", type=click.Path(path_type=Path), default=PAGE, help="The page with the tables.")
@click.option("--render", "only_render", is_flag=True, help="Only fill the page from the record.")
def main(assembly: Path, out: Path, path: Path, only_render: bool) -> None:
    if not only_render:
        records.write(out, predicted(assembly))
    render(json.loads(out.read_text(encoding="utf-8")), path)


if __name__ == "__main__":
    main()
