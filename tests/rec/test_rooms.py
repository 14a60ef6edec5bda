"""Imports inside saml_rec go one way: a room imports from those before it only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "saml_rec"
ROOMS = (
    ("errors", "lazy", "files", "toml_file", "console", "sealed", "run_directory", "processes"),
    ("data",),
    ("datasets", "models"),
    ("evaluation",),
    ("training",),
    ("comparison", "tuning", "bench", "export"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
# Public names that stay where users import them from, resolved at first use.
LATER = {"data/__init__.py"}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree):
    """Rooms that a module names in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "saml_rec":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("saml_rec."))


def wrong(room, tree):
    return [name for name in imported(tree) if name in LEVEL and LEVEL[name] > LEVEL[room]]


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_from_those_before_it(path):
    if path.relative_to(PACKAGE).as_posix() in LATER:
        return
    assert wrong(room_of(path), ast.parse(path.read_text(encoding="utf-8"))) == []


def test_rooms_side_by_side_do_not_import_each_other():
    for names in ROOMS[1:]:
        for name in names:
            for path in sorted((PACKAGE / name).rglob("*.py")):
                others = set(imported(ast.parse(path.read_text(encoding="utf-8")))) & (set(names) - {name})
                assert not others, path


def test_a_violation_is_seen():
    for text in ("from saml_rec.training.loop import train", "import saml_rec.cli", "from saml_rec import comparison"):
        assert wrong("evaluation", ast.parse(text))
    assert not wrong("evaluation", ast.parse("from saml_rec.data import table\nfrom saml_rec import InputError"))
