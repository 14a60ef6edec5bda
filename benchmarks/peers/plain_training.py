"""What one would write without saml_rec's data path: the table read whole, ids mapped by polars, batches by indexing.

The model is the same, with dense tables and AdamW. Prints one line of JSON.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from saml_rec import load_schema
from saml_rec.models import SAML

PADDING, UNKNOWN, FIRST = 0, 1, 2
LENGTHS = {"tags": 3, "history": 20}


def ids_of(values: pl.Series, vocabulary: list[str]) -> np.ndarray:
    known = pl.Series(vocabulary, dtype=pl.String)
    numbers = pl.int_range(FIRST, FIRST + len(vocabulary), dtype=pl.Int32, eager=True)
    return values.replace_strict(known, numbers, default=UNKNOWN, return_dtype=pl.Int32).to_numpy()


def padded(lists: pl.Series, vocabulary: list[str], width: int) -> torch.Tensor:
    lists = lists.list.tail(width)
    lengths = lists.list.len().fill_null(0).to_numpy()
    values = ids_of(lists.filter(lists.list.len() > 0).explode(), vocabulary)
    result = np.zeros((len(lists), width), np.int32)
    result[np.arange(width) < lengths[:, None]] = values
    return torch.from_numpy(result)


def main(data: str, schema_path: str, batch_size: int, limit: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.perf_counter()
    schema = load_schema(Path(schema_path))
    frame = pl.read_csv(data, schema_overrides=dict.fromkeys(("user_id", "item_id", "tags", "history"), pl.String))
    cut = frame["timestamp"].sort()[round(0.8 * frame.height) - 1]
    training = frame.filter(pl.col("timestamp") <= cut)
    words: dict[str, list[str]] = {}
    for name in ("user_id", "item_id"):
        words[name] = training[name].value_counts(sort=True)[name].to_list()
    words["tags"] = training["tags"].str.split("|").explode().drop_nulls().value_counts(sort=True)["tags"].to_list()
    scenarios = training["scenario"].unique().sort().to_list()
    features = {
        name: torch.from_numpy(ids_of(training[name], words[name]).astype(np.int64)) for name in ("user_id", "item_id")
    }
    for name, item in (("tags", "tags"), ("history", "item_id")):
        features[name] = padded(training[name].str.split("|"), words[item], LENGTHS[name])
    price = training["price"]
    normalised = ((price - price.mean()) / price.std()).fill_null(0).to_numpy()
    dense = torch.from_numpy(np.stack([normalised, price.is_null().to_numpy()], axis=1).astype(np.float32))
    scenario = torch.from_numpy(ids_of(training["scenario"], scenarios).astype(np.int64)) - FIRST
    label = torch.from_numpy(training["label"].to_numpy().astype(np.float32))
    del frame, training, price
    ready = time.perf_counter() - start
    model = SAML(schema, len(scenarios), vocabulary_sizes={name: FIRST + len(each) for name, each in words.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
    start, rows = time.perf_counter(), 0
    for chosen in torch.randperm(len(label)).split(batch_size):
        batch = {
            "scenario": scenario[chosen],
            "dense": dense[chosen],
            "label": label[chosen],
            "features": {name: ids[chosen].long() for name, ids in features.items()},
        }
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows += len(chosen)
        if time.perf_counter() - start > limit:
            break
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"prepare_seconds": ready, "train_rows": len(label), "rows": rows, "seconds": seconds, "peak_bytes": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
