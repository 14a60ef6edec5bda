"""saml-rec export: the exported program gives the model's scores for any number of rows, and a C++ process the same."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from click.testing import CliRunner

from saml_kernels import extension
from saml_rec import InputError
from saml_rec.cli import main
from saml_rec.data import write_synthetic
from saml_rec.data.encoding import Encoder
from saml_rec.data.schema import Schema
from saml_rec.export import export, inputs_of, program_of, tensors_of
from saml_rec.models.construction import build_model

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "serve_cpp"
# That of the environment, which need not be active.
CMAKE = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
PAGE = ROOT / "docs" / "serving.md"
SCHEMA = Schema.from_dict(
    {
        "label": "y",
        "scenario": "shop",
        "features": {
            "item": {"kind": "sparse", "scenario_aware": True, "dim": 4},
            "user": {"kind": "sparse", "dim": 4},
            "tags": {"kind": "multi", "scenario_aware": True, "dim": 4},
            "price": {"kind": "dense"},
            "seen": {"kind": "sequence", "item": "item", "max_length": 5},
        },
    }
)
ENCODER = Encoder(
    schema=SCHEMA,
    scenario_names=("a", "b", "c"),
    vocabularies={name: tuple(map(str, range(9))) for name in ("item", "user", "tags")},
    moments={"price": (1.0, 2.0)},
)
# These have layers, options of layers or steps that no other has; the others are exported with the slow tests.
QUICK = ("saml", "hmoe", "shared_bottom")
SLOW = ("star", "mmoe", "ple", "pepnet", "mlp", "mlp_scenario", "per_scenario")
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def drawn(rows, length=3):
    torch.manual_seed(rows)
    ids = {name: torch.randint(11, (rows,)) for name in ("item", "user")}
    ids |= {name: torch.randint(11, (rows, length)) for name in ("tags", "seen")}
    return {"scenario": torch.randint(3, (rows,)), "dense": torch.randn(rows, 2), "features": ids}


@pytest.mark.parametrize("name", MODELS)
def test_the_program_gives_the_models_scores(name):
    torch.manual_seed(0)
    model = build_model(name, {}, SCHEMA, ENCODER).eval()
    program = program_of(model, ENCODER).module()
    # One row, one value in a bag, and numbers that it was not traced with.
    for batch in (drawn(1, 1), drawn(2), drawn(300, 6)):
        logit, prediction = program(*tensors_of(ENCODER, batch))
        expected = model(batch).logit
        torch.testing.assert_close(logit, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(prediction, expected.double().sigmoid(), rtol=1e-5, atol=1e-6)


def test_inputs_are_those_of_the_schema_in_order():
    assert [(each.name, each.dtype, each.shape) for each in inputs_of(ENCODER)] == [
        ("scenario", "int64", ["rows"]),
        ("dense", "float32", ["rows", 2]),
        ("features.item", "int64", ["rows"]),
        ("features.user", "int64", ["rows"]),
        ("features.tags", "int64", ["rows", "length of tags"]),
        ("features.seen", "int64", ["rows", "length of seen"]),
    ]
    batch = drawn(4)
    scenario, dense, _, user, *_ = tensors_of(ENCODER, batch)
    assert scenario is batch["scenario"]
    assert dense is batch["dense"]
    assert user is batch["features"]["user"]


def trained(folder, model="saml", rows=600):
    """A finished run and its table."""
    table, schema, _ = write_synthetic(folder / "data", rows=rows)
    arguments = ("--data", table, "--schema", schema, "--model", model, "--epochs", 1, "--out", folder / "run")
    done = CliRunner().invoke(main, ["train", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return folder / "run", table


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    run, _ = trained(tmp_path, "logistic_regression")
    with pytest.raises(InputError, match="model logistic_regression is no network: export takes those"):
        export(run, tmp_path / "model.pt2")
    with pytest.raises(InputError, match=r"model\.so: the name must end in \.pt2"):
        export(run, tmp_path / "model.so")
    with pytest.raises(InputError, match="nowhere does not exist"):
        export(run, tmp_path / "nowhere" / "model.pt2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"'no-such-compiler' is not there; set CXX"):
        export(run, tmp_path / "model.pt2")
    assert list(tmp_path.glob("model*")) == []


@pytest.mark.slow
def test_a_process_without_python_gives_the_scores_of_predict(tmp_path, monkeypatch):
    if CMAKE is None:
        pytest.skip("cmake, of the extra saml-kernels[test], is not installed")
    run, table = trained(tmp_path)
    folder = tmp_path / "served"
    folder.mkdir()
    out = folder / "model.pt2"
    done = CliRunner().invoke(main, ["export", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    manifest = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    for described in manifest["files"].values():
        content = (folder / described["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (described["bytes"], described["sha256"])
    operators = manifest["files"]["operators"]["name"]
    assert operators == extension.library_path(torch.__version__).name
    assert manifest["scenario"] == {"column": "scenario", "names": ["s0", "s1", "s2", "s3"]}

    # Rows encoded by what stands in the file, as the page says.
    monkeypatch.chdir(tmp_path)
    shutil.copy(table, "new.csv")
    page: dict[str, Any] = {}
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile(block, str(PAGE), "exec"), page)
    encoder, encoded = page["encoder"], page["table"]
    predicted = CliRunner().invoke(
        main, ["predict", str(run), "--data", str(table), "--out", str(tmp_path / "predicted.parquet")]
    )
    assert predicted.exit_code == 0, predicted.output
    expected = polars.read_parquet(tmp_path / "predicted.parquet")["prediction"].to_numpy()

    score = built(tmp_path / "build")
    linked = subprocess.run(("ldd", score), capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in linked
    assert "libpython" not in linked
    assert "libtorch_python" not in linked

    def scores(batch):
        torch.save(list(tensors_of(encoder, batch)), tmp_path / "rows.pt")
        command = (score, out, folder / operators, tmp_path / "rows.pt")
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    for rows in (torch.arange(1), torch.arange(len(encoded))):
        done = scores(encoded.batch(rows))
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(np.array(done.stdout.split(), float), expected[: len(rows)], rtol=1e-5)

    outside = encoded.batch(torch.arange(3))
    outside["scenario"] = torch.tensor([0, 4, 1])
    refused = scores(outside)
    assert refused.returncode == 1
    assert "scenario ids" in refused.stderr


def built(folder):
    """The example, compiled."""
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in ((CMAKE, "-S", EXAMPLE, "-B", folder, prefix), (CMAKE, "--build", folder)):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "score"
