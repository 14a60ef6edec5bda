"""The mutants of a Python file: its text with one small change each, such as a tired programmer makes.

What is changed in a node of the syntax tree says mutmut (``mutmut.mutation.mutators``): numbers, operators,
comparisons, arguments of calls, assigned values, names of methods. Here every node is offered to it, those of decorated
functions, properties and constants of modules too, which mutmut leaves out because it keeps all mutants of a function
in one file; and statements and conditions are added, of which mutmut has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_arg_removal, operator_string

NOT_EXECUTED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Assert)
"""Their mutants are of types, fail at import, or are what nobody relies on."""


@dataclass(frozen=True)
class Mutant:
    """A changed file.

    Args:
        text: of the whole file.
        first, last: lines of the node that was changed, counted from 1.
    """

    text: str
    first: int
    last: int


def mutants_of(text: str, lines: set[int] | None = None) -> Iterator[Mutant]:
    """All mutants of a file in which one of these lines, or any, is changed; no two alike."""
    wrapper = MetadataWrapper(cst.parse_module(text))
    module, positions = wrapper.module, wrapper.resolve(PositionProvider)
    parts = [module.code_for_node(part) for part in (*module.header, *module.body, *module.footer)]
    seen = {text}
    for number, part in enumerate(module.body, start=len(module.header)):
        for node in _executed(part):
            if node not in positions:
                continue
            first, last = positions[node].start.line, positions[node].end.line
            if lines is not None and lines.isdisjoint(range(first, last + 1)):
                continue
            for changed in _changes(node):
                code = module.code_for_node(part.deep_replace(node, changed))
                mutated = "".join([*parts[:number], code, *parts[number + 1 :]])
                if mutated not in seen and _compiles(mutated):
                    seen.add(mutated)
                    yield Mutant(mutated, first, last)


def _executed(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    """A node and those below it, without annotations, decorators, imports and strings that document."""
    if isinstance(node, NOT_EXECUTED) or (isinstance(node, cst.Expr) and isinstance(node.value, cst.BaseString)):
        return
    if isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING":
        return
    yield node
    # What an error says is read by people, and quoted by tests as far as they rely on it.
    if not isinstance(node, cst.Raise):
        for child in node.children:
            yield from _executed(child)


def _changes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in mutation_operators:
        if not isinstance(node, kind):
            continue
        changed = list(operator(node))
        if operator is operator_string:
            # That it is another text, not its case.
            changed = changed[:1]
        elif operator is operator_arg_removal:
            # None in place of an argument, which mostly is what leaving it out is.
            changed = [each for each in changed if len(each.args) == len(node.args)]
        yield from changed
    if isinstance(node, cst.If | cst.While):
        yield node.with_changes(test=cst.Name("False"))
    if isinstance(node, cst.If | cst.CompIf):
        yield node.with_changes(test=cst.Name("True"))
    if isinstance(node, cst.Expr | cst.Raise | cst.AugAssign | cst.Del) and not _is_yield(node):
        yield cst.Pass()
    if isinstance(node, cst.Return) and node.value is not None:
        yield node.with_changes(value=cst.Name("None"))


def _is_yield(node: cst.CSTNode) -> bool:
    """Without it a function is no generator."""
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.Yield)


def _compiles(text: str) -> bool:
    try:
        compile(text, "mutant", "exec")
    except (SyntaxError, ValueError):
        return False
    return True
