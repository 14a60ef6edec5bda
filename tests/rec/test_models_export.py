"""Whole models through torch.export, of any batch size, saved and loaded."""

import io

import pytest
import torch

from saml_rec.data.schema import FeatureSpec, Schema
from saml_rec.models import MODELS
from saml_rec.models.registry import is_fitted

SCHEMA = Schema(
    label="click",
    scenario="country",
    features=(
        FeatureSpec("user", "sparse", dim=4),
        FeatureSpec("tags", "multi", dim=2, scenario_aware=True),
        FeatureSpec("age", "dense"),
        FeatureSpec("history", "sequence", item="user"),
    ),
)
M, V = 3, 9


def make_batch(rows):
    def ids(*shape):
        return torch.randint(V, shape)

    features = {"user": ids(rows), "tags": ids(rows, 3), "history": ids(rows, 3)}
    return {"scenario": torch.arange(rows) % M, "dense": torch.randn(rows, 2), "features": features}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "saml" else pytest.mark.slow) for name in MODELS if not is_fitted(name)],
)
def test_an_exported_model_takes_any_batch_size(name):
    torch.manual_seed(0)
    model = MODELS[name](SCHEMA, M, vocabulary_sizes={"user": V, "tags": V}, hidden_dims=(6, 4)).eval()
    batch = make_batch(4)
    rows = torch.export.Dim("B")
    shapes = {"scenario": {0: rows}, "dense": {0: rows}, "features": {key: {0: rows} for key in batch["features"]}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (batch,), dynamic_shapes=(shapes,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (1, 2, 9):
        batch = make_batch(count)
        torch.testing.assert_close(loaded(batch).logit, model(batch).logit)
