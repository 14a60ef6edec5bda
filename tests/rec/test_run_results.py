"""What a run leaves for other programs and for people: model.safetensors and model_card.md."""

import json
import re
import shlex
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import saml_kernels
from saml_rec.data.schema import load_schema
from saml_rec.errors import InputError
from saml_rec.sealed import load, require_digest, save_tensors
from saml_rec.training.model_card import model_card


@pytest.fixture(scope="module")
def finished(saml_rec_once, small_dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "run"
    given = ("--data", small_dataset.data, "--schema", small_dataset.schema, "--out", out)
    assert saml_rec_once("train", *given, "--epochs", 1, "--hidden-dims", "6,4").exit_code == 0
    return out


@pytest.fixture(scope="module")
def saml_rec_once():
    from click.testing import CliRunner

    from saml_rec.cli import main

    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_safetensors_hold_the_weights(finished):
    weights = load(finished / "model.pt", "model")["weights"]
    tensors = load_file(finished / "model.safetensors")
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weights[name]) for name in weights)
    with safe_open(finished / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "saml", "saml_kernels": saml_kernels.__version__}


@pytest.mark.parametrize("damage", ["changed", "missing", "short"])
def test_damaged_safetensors_are_refused_where_a_run_is_read_back(
    saml_rec_once, small_dataset, finished, tmp_path, damage
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "changed" else content[:-4])
    given = ("--data", small_dataset.data, "--schema", small_dataset.schema, "--out", run, "--resume")
    result = saml_rec_once("train", *given, "--epochs", 1, "--hidden-dims", "6,4")
    if damage == "missing":
        assert "is finished already" in result.output
    else:
        assert result.exit_code == 2
        assert result.stderr == f"error: {path}: is damaged: it is not as it was written\n"


def test_a_file_of_tensors_is_written_whole_and_its_digest_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    transposed = torch.arange(6.0).reshape(2, 3).t()
    digest = save_tensors(path, {"w": transposed, "n": torch.tensor(3)}, {"format": "pt"})
    assert torch.equal(load_file(path)["w"], transposed)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    require_digest(path, digest)
    require_digest(path, None)
    with pytest.raises(InputError, match="is damaged"):
        require_digest(path, digest[::-1])
    with pytest.raises(InputError, match="not written, w has numbers that are not finite"):
        save_tensors(path, {"w": torch.tensor([1.0, float("nan")])}, {})
    require_digest(path, digest)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def rows_of(card, heading):
    section = card.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line[:1] == "|"
    ]


def test_the_card_says_what_the_run_is(finished, small_dataset):
    card = (finished / "model_card.md").read_text(encoding="utf-8")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert card.startswith("# Model card: saml\n")
    assert str(small_dataset.data) in card
    table = rows_of(card, "Metrics on the test rows")
    assert table[0] == ["scenario", "AUC", "log loss", "predicted/observed", "rows"]
    assert [row[0] for row in table[2:]] == ["\\[it]" if name == "[it]" else name for name in metrics["scenarios"]] + [
        "overall"
    ]
    de = metrics["scenarios"]["de"]
    assert [
        "de",
        f"{de['auc']:.4f}",
        f"{de['logloss']:.4f}",
        f"{de['predicted_over_observed']:.4f}",
        str(de["rows"]),
    ] in table
    schema = load_schema(small_dataset.schema)
    features = {row[0]: row[1:] for row in rows_of(card, "Schema")}
    assert all(features[feature.name][0] == feature.kind for feature in schema.features)
    assert features["user"] == ["sparse", "True"]
    assert features["label"] == ["click"]
    assert ["torch", torch.__version__] in rows_of(card, "Versions")
    assert ["hidden_dims", "6, 4"] in rows_of(card, "Options")


def test_the_command_of_the_card_reproduces_the_run(saml_rec_once, finished, tmp_path, monkeypatch):
    card = (finished / "model_card.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (saml-rec .*)$", card, re.MULTILINE)
    monkeypatch.chdir(finished)
    program, *arguments = shlex.split(command.replace("DIRECTORY", str(tmp_path / "again")))
    assert program == "saml-rec"
    assert saml_rec_once(*arguments).exit_code == 0
    weights = [load(run / "model.pt", "model")["weights"] for run in (finished, tmp_path / "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_names_out_of_data_make_no_markdown(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    strange = "a|b\n# <b>[x](y)`" + "z" * 500
    metrics["scenarios"] = {strange: metrics["scenarios"]["de"]}
    schema = {"label": "click|x", "scenario": "s", "features": {strange: {"kind": "sparse"}}}
    card = model_card(metrics, schema, None)
    for heading, columns in (("Metrics on the test rows", 5), ("Schema", 3)):
        assert all(len(row) in (2, columns) for row in rows_of(card, heading))
    assert "\n# <b>" not in card
    assert "\\<b>\\[x](y)\\`" in card
    assert "z" * 300 not in card
    assert "The run was made from Python" in card
