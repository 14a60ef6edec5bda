"""Every block of docs/tutorial.md and of the README runs, in its order, and prints what the page shows."""

import contextlib
import io
import re
import shlex
from itertools import pairwise
from pathlib import Path

import polars
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import saml_kernels
from saml_rec.cli import main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def saml_rec(line: str, *quick: str) -> str:
    program, *arguments = shlex.split(line, comments=True)
    assert program == "saml-rec"
    result = CliRunner().invoke(main, [*arguments, *quick])
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def test_the_tutorial_from_its_first_block_to_its_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(read("docs/tutorial.md"))
    assert {language for language, _ in blocks} == {"python", "bash", "text"}
    namespace: dict[str, object] = {}
    printed = ""
    for language, code in blocks:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(code, "docs/tutorial.md", "exec"), namespace)
            printed = output.getvalue()
        elif language == "bash":
            for line in code.splitlines():
                saml_rec(line)
        else:
            assert printed.strip() == code.strip()
    assert polars.read_csv("predictions.csv")["prediction"].is_between(0, 1).all()
    assert Path("runs/compare/report.html").exists()


def test_every_output_in_the_tutorial_stands_below_its_block():
    languages = [language for language, _ in BLOCK.findall(read("docs/tutorial.md"))]
    for before, language in pairwise(languages):
        assert language != "text" or before == "python"
    printing = [code for language, code in BLOCK.findall(read("docs/tutorial.md")) if "print(" in code]
    assert len(printing) == languages.count("text")


def test_the_python_of_the_readme():
    fuse, layer = [code for language, code in BLOCK.findall(read("README.md")) if language == "python"]
    before, after = fuse.split("# after")
    model = nn.Module()
    model.towers = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(3))
    x, scenario = torch.randn(64, 8, requires_grad=True), torch.randint(0, 3, (64,))
    namespace = {"torch": torch, "saml_kernels": saml_kernels, "model": model, "x": x, "scenario": scenario}
    outputs, gradients = [], []
    for code in (before, f"# after{after}"):
        exec(compile(code, "README.md", "exec"), namespace)
        outputs.append(namespace["out"])
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), x)[0])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    namespace = {}
    exec(compile(layer, "README.md", "exec"), namespace)
    assert (namespace["own"].shape, namespace["aux"].shape) == ((4096, 128), (4096, 128))


@pytest.mark.parametrize("page", ["docs/layers.md", "docs/pytorch.md"])
def test_the_python_of_the_reference_pages(page):
    namespace: dict[str, object] = {}
    blocks = [code for language, code in BLOCK.findall(read(page)) if language == "python"]
    assert blocks
    for code in blocks:
        exec(compile(code, page, "exec"), namespace)


def test_the_commands_of_the_readme_on_its_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = 80
    (schema,) = [code for language, code in BLOCK.findall(read("README.md")) if language == "toml"]
    Path("schema.toml").write_text(schema, encoding="utf-8")
    frame = polars.DataFrame(
        {
            "label": [0, 1, 1, 0] * (rows // 4),
            "country": ["de", "de", "fr", "fr"] * (rows // 4),
            "ts": range(rows),
            "item_id": ["17", "4", "99", "5", "8"] * (rows // 5),
            "categories": ["shoes|sale", ""] * (rows // 2),
            "history": ["17|4|99", "", "5", "8|8"] * (rows // 4),
        }
    )
    frame.write_csv("ratings.csv")
    frame.drop("label").write_csv("new.csv")
    quick = {
        "train": ("--epochs", "1"),
        "compare": ("--epochs", "1", "--seeds", "1"),
        "bench": ("--rows", "16", "--hidden", "8", "--budget", "0.1"),
    }
    lines = re.findall(r"^    (saml-rec .*)$", read("README.md"), re.MULTILINE)
    assert {line.split()[1] for line in lines} >= {"train", "evaluate", "predict", "compare"}
    for line in lines:
        saml_rec(line, *quick.get(line.split()[1], ()))
    assert len(polars.read_csv("predictions.csv")) == rows


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", BLOCK.sub("", read(page)))
    for target in LINK.findall(text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_the_citation_names_this_version():
    assert re.findall(r"^version: (.*)$", read("CITATION.cff"), re.MULTILINE) == [saml_kernels.__version__]
