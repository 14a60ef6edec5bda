"""make mutants: what it changes, and which changes need no import."""

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "mutation"
TEXT = '''\
"""A module."""

LIMIT = 2**53


class Lock:
    @property
    def kind(self) -> str:
        return "exclusive"


def train(layers, size: int = 3):
    """Trains."""
    for layer in layers:
        layer.train(size > LIMIT)
    if not layers:
        raise ValueError(f"no layers, {size}")
    return [layer for layer in layers if layer.weight]
'''


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, found)
    spec.loader.exec_module(found)
    return found


def test_every_kind_of_change(monkeypatch):
    pytest.importorskip("mutmut", reason="the extra saml-kernels[mutation] is not installed")
    mutations = module("mutations", monkeypatch)
    before = TEXT.splitlines()
    found = set()
    for mutant in mutations.mutants_of(TEXT):
        after = mutant.text.splitlines()
        (number,) = [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
        assert mutant.first <= number + 1 <= mutant.last
        found.add((number + 1, after[number].strip()))
    assert found >= {
        (3, "LIMIT = 2**54"),
        (9, "return None"),
        (12, "def train(layers, size: int = 4):"),
        (15, "pass"),
        (15, "layer.train(size >= LIMIT)"),
        (16, "if layers:"),
        (16, "if False:"),
        (17, "pass"),
        (18, "return [layer for layer in layers if True]"),
    }
    assert {number for number, _ in found} == {3, 9, 12, 15, 16, 17, 18}
    assert {mutant.first for mutant in mutations.mutants_of(TEXT, {15})} >= {15}
    assert all(mutant.first <= 15 <= mutant.last for mutant in mutations.mutants_of(TEXT, {15}))


@pytest.mark.parametrize(
    ("old", "new", "functions"),
    [
        ("size > LIMIT", "size < LIMIT", ["train"]),
        ('"exclusive"', '"shared"', ["Lock.kind"]),
        ("if layer.weight", "if True", ["train"]),
        ("LIMIT = 2**53", "LIMIT = 2**54", None),
        ("size: int = 3", "size: int = 4", None),
        ("@property", "@staticmethod", None),
        ("A module", "The module", None),
        ("    for layer in", "\n    for layer in", []),
    ],
)
def test_code_that_can_be_swapped(monkeypatch, old, new, functions):
    swapping = module("swapping", monkeypatch)
    swaps = swapping.swaps_between(TEXT, TEXT.replace(old, new), "a.py")
    assert (None if swaps is None else [name for (name, _), _ in swaps]) == functions


def test_survivors_have_reasons_and_every_module_has_tests(monkeypatch):
    pytest.importorskip("mutmut", reason="the extra saml-kernels[mutation] is not installed")
    run = module("run", monkeypatch)
    for file, reasons in run.read_reasons().items():
        lines = {line.strip() for line in (run.ROOT / file).read_text(encoding="utf-8").splitlines()}
        assert [change.before for change in reasons if not lines.issuperset(change.before)] == []
    for source in run.SOURCES:
        for path in (run.ROOT / source).rglob("[a-z]*.py"):
            tests = run.tests_of(str(path.relative_to(run.ROOT)))
            assert bool(tests) == ("triton/kernels/" not in str(path)), path
            assert all((run.ROOT / test).exists() for test in tests), path
