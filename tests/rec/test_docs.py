"""What the documentation shows is what there is: options, defaults, commands, the schema."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import click
import polars
import pytest

from saml_rec.cli import main
from saml_rec.data.encoding import flat
from saml_rec.data.readers import TableFiles, read_table
from saml_rec.data.schema import Schema
from saml_rec.errors import InputError
from saml_rec.models.hyperparameters import HYPERPARAMETERS

DOCS = Path(__file__).parents[2] / "docs"
CLI = (DOCS / "cli.md").read_text(encoding="utf-8")
COMPARE = (DOCS / "compare.md").read_text(encoding="utf-8")
TRAIN = CLI.partition("## `train`")[2].partition("###")[0]
DATA = (DOCS / "data.md").read_text(encoding="utf-8")
TABLE_ROW = re.compile(r"^\| `(--[a-z-]+)[^`]*` \|(.*)\|$", re.MULTILINE)


def commands(group=main):
    for command in group.commands.values():
        yield from commands(command) if isinstance(command, click.Group) else [command]


def block(text, language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def test_every_option_is_documented_and_exists():
    exist = {name for command in commands() for option in command.params for name in option.opts if name[:2] == "--"}
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", CLI + COMPARE)) == exist | {"--help", "--version"}


def test_documented_defaults():
    hyperparameters = {f"--{name.replace('_', '-')}" for name in HYPERPARAMETERS}
    train = {option.opts[0]: option for option in main.commands["train"].params}
    rows = {
        option: [cell.strip().strip("`") for cell in cells.split("|")] for option, cells in TABLE_ROW.findall(TRAIN)
    }
    assert rows.keys() == train.keys()
    for option in rows.keys() - hyperparameters:
        given, cell = train[option], rows[option][0]
        shown = (
            "required"
            if given.required
            else ""
            if given.is_flag or not isinstance(given.default, str | int | float)
            else str(given.default)
        )
        assert cell == shown or float(cell) == given.default, option


def test_the_table_of_hyperparameters_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_options", DOCS / "make_options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page(CLI) == CLI, "run python docs/make_options.py"
    table = CLI.partition("<!-- hyperparameters -->")[2].partition("<!-- end -->")[0]
    assert "| `--hidden-dims N,N,...` | `64,32`: saml, star," in table
    assert table.count("\n| `--") == len(HYPERPARAMETERS)


def test_the_schema_and_the_loop_of_data_md(tmp_path, monkeypatch, capsys):
    rows = 40
    frame = polars.DataFrame(
        {
            "label": [0, 1] * (rows // 2),
            "country": ["de", "fr"] * (rows // 2),
            "ts": range(rows),
            "user_id": ["u1", "u2"] * (rows // 2),
            "item_id": ["17", "4", "99", "5"] * (rows // 4),
            "categories": ["shoes|sale", ""] * (rows // 2),
            "price": [1.5, None] * (rows // 2),
            "history": ["17|4|99", ""] * (rows // 2),
        }
    )
    assert set(tomllib.loads(block(DATA, "toml"))["features"]) <= set(frame.columns)
    (tmp_path / "schema.toml").write_text(block(DATA, "toml"), encoding="utf-8")
    frame.write_csv(tmp_path / "clicks.csv")
    monkeypatch.chdir(tmp_path)
    exec(block(DATA, "python").replace("...", "print(batch['features']['item_id'].tolist())"), {})
    # 32 training rows, every item eight times: ids from 2 on, equally frequent ones by value.
    assert capsys.readouterr().out == f"{[2, 3, 5, 4] * 8}\n"


def examples(name):
    """Rows of a table of examples in data.md: their cells without the bars that Markdown escapes."""
    table = DATA.partition(f"<!-- {name} -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    assert table
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


USUAL = {"label": "0", "s": "de", "time": "5", "split": "train", "sparse": "x", "multi": "x", "dense": "1"}
USUAL["sequence"] = "x"


@pytest.mark.parametrize(("column", "cell", "result"), examples("cells"))
def test_the_cells_of_data_md(tmp_path, column, cell, result):
    split = {"split_column": "split"} if column == "split" else {"time": "time"}
    features = {kind: {"kind": kind} for kind in ("sparse", "multi", "dense", "sequence")}
    features["sequence"]["item"] = "sparse"
    schema = Schema.from_dict({"label": "label", "scenario": "s", "features": features, **split})
    usual = dict(USUAL)
    if column == "time" and "beside" not in result:
        usual["time"] = "2024-01-30"
    if column == "label" and "beside" not in result:
        usual["label"] = "1"
    path = tmp_path / "a.csv"
    polars.DataFrame([usual, usual | {column: cell.strip("`")}]).write_csv(path)
    if result.startswith("refused"):
        with pytest.raises(InputError, match=re.escape(result.partition(": ")[2])):
            read_table(path, schema)
        return
    value = read_table(path, schema)[column][1]
    found = [] if value is None else [str(value)]
    if column in ("multi", "sequence"):
        found = flat(read_table(path, schema)[column][1:], schema.feature(column)).to_list()
    expected = result.removeprefix("read as ")
    assert (", ".join(f"`{each}`" for each in found) or "nothing") == expected


@pytest.mark.parametrize(("content", "result"), examples("files"))
def test_the_files_of_data_md(tmp_path, content, result):
    features = {"item": {"kind": "sparse"}, "price": {"kind": "dense"}}
    schema = Schema.from_dict({"label": "label", "scenario": "s", "features": features})
    path = tmp_path / "a.csv"
    path.write_bytes(content.strip("`").replace("⏎", "\n").replace("⇥", "\t").encode())
    if result.startswith("refused: "):
        with pytest.raises(InputError, match=re.escape(result.removeprefix("refused: "))):
            read_table(path, schema)
        return
    kind, _, item = result.partition(": ")
    frame = read_table(path, schema)
    assert frame.to_dicts() == [{"label": 1, "s": "de", "item": item.strip("`") or "a", "price": 1.5}]
    lines = TableFiles(path, schema).format_lines()
    assert lines == ([] if kind == "read as usual" else [f"{path}: {kind}"])


@pytest.mark.slow
def test_the_commands_of_cli_md(saml_rec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^    saml-rec (.*)$", CLI.partition("## Exit status")[0], re.MULTILINE)
    assert [line.split()[0] for line in shown] == ["data", "train", "evaluate", "predict"]
    for line in shown:
        result = saml_rec(*shlex.split(line))
        assert result.exit_code == 0, result.output
    assert polars.read_csv("predictions.csv")["prediction"].is_between(0, 1).all()
