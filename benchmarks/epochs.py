"""One side of benchmarks/step.py: trains SAML for one epoch, from the same start, for every line on standard input.

Answers with a line of JSON each: seconds, rows a second, training loss, and the share of processor time that went to
others meanwhile.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from saml_kernels.testing import timing
from saml_rec import load_schema
from saml_rec.data import prepare
from saml_rec.training import TrainOptions, train


def main(data_path: str, schema_path: str) -> None:
    torch.set_num_threads(1)
    schema = load_schema(Path(schema_path))
    data = prepare(data_path, schema, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        for _ in sys.stdin:
            with timing.Others() as others:
                run = train(data, schema, TrainOptions(epochs=1, device="cpu"), Path(folder) / "run", overwrite=True)
            (epoch,) = run.history
            told = {name: epoch[name] for name in ("seconds", "rows_per_second", "train_loss")}
            print(json.dumps(told | {"others": others.share}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
