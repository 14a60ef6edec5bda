"""Writes docs/api.md from the docstrings: python docs/make_api.py

What ``__all__`` lists is public, and of the modules of saml_kernels.testing what they define. Signatures are those of
the source: they read as they were written.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).parent / "api.md"
PACKAGES = (
    "saml_kernels",
    "saml_kernels.layers",
    "saml_kernels.testing.problem",
    "saml_kernels.testing.accuracy",
    "saml_kernels.testing.timing",
    "saml_rec",
    "saml_rec.models",
    "saml_rec.data",
    "saml_rec.datasets",
    "saml_rec.training",
    "saml_rec.evaluation",
    "saml_rec.comparison",
    "saml_rec.tuning",
)
"""Those that do not exist or have nothing public are left out."""
HEAD = """\
# Functions and classes

Made from the docstrings by `python docs/make_api.py`; a test compares the two. B rows, M scenarios; the other
letters are those of [computation.md](computation.md).
"""
WIDEST = 100
"""Signatures that are longer have a line for each parameter."""
HEADING = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Warns):$")
ENTRY = re.compile(r"^([\w*]+(?:, [\w*]+)*): (.*)$", re.DOTALL)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    seen: set[int] = set()
    sections = []
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name is None or not package.startswith(error.name):
                raise
            continue
        entries = [(name, getattr(module, name)) for name in sorted(public(module), key=str.lower)]
        fresh = [(name, value) for name, value in entries if id(value) not in seen and not inspect.ismodule(value)]
        seen.update(id(value) for _, value in fresh)
        described = [text for name, value in fresh if (text := describe(package, name, value))]
        if described:
            sections.append((package, docstring(inspect.getdoc(module) or "", first_only=True), described))
    contents = "\n".join(f"- [`{name}`](#{name.replace('.', '').lower()})" for name, _, _ in sections)
    body = "\n".join(f"## {name}\n\n{text}\n\n" + "\n".join(described) for name, text, described in sections)
    return f"{HEAD}\n{contents}\n\n{body}"


def public(module: ModuleType) -> list[str]:
    """What ``__all__`` lists; for testing's modules, which have none, what they define and document."""
    if hasattr(module, "__all__") or not module.__name__.startswith("saml_kernels.testing."):
        return list(getattr(module, "__all__", ()))
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return [name for name, value in own.items() if name[0] != "_" and inspect.getdoc(value)]


def describe(package: str, name: str, value: Any) -> str:
    """One function, class or table; empty for what has no docstring of its own."""
    if inspect.isclass(value):
        return of_class(package, name, value)
    if inspect.isfunction(value):
        node = definition(value)
        assert isinstance(node, Function)
        return f"### `{name}`\n\n{signature(f'{package}.{name}', node)}{docstring(inspect.getdoc(value) or '')}"
    if isinstance(value, dict):
        return f"### `{name}`\n\nA table with the keys {', '.join(f'`{key}`' for key in value)}.\n"
    return ""


def of_class(package: str, name: str, value: type) -> str:
    node = definition(value)
    assert isinstance(node, ast.ClassDef)
    methods = {item.name: item for item in node.body if isinstance(item, Function) and not overloaded(item)}
    parts = [f"### `{name}`\n"]
    init = next((base.__dict__["__init__"] for base in value.__mro__ if "__init__" in base.__dict__), None)
    own_init = methods.get("__init__") or inherited_init(value, init)
    if own_init is not None:
        parts.append(signature(f"{package}.{name}", own_init, skip_first=True))
    elif dataclasses.is_dataclass(value) or issubclass(value, tuple):
        parts.append(signature(f"{package}.{name}", constructor(node)))
    else:
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        parts.append(f"```python\nclass {package}.{name}{f'({bases})' if bases else ''}\n```\n")
    parts.append(docstring(value.__doc__ or "") + "\n")
    if fields := list(documented_fields(node)):
        parts.append("\n".join(fields) + "\n")
    for method, item in methods.items():
        text = ast.get_docstring(item)
        if text is None or method.startswith("_"):
            continue
        kinds = {ast.unparse(decorator) for decorator in item.decorator_list}
        if "property" in kinds:
            parts.append(f"`.{method}`\n\n{docstring(text)}\n")
        else:
            parts.append(signature(f".{method}", item, skip_first="staticmethod" not in kinds) + docstring(text) + "\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def inherited_init(value: type, init: Any) -> Function | None:
    """The constructor of a base class of this project."""
    if not inspect.isfunction(init) or not init.__module__.startswith(("saml_kernels", "saml_rec")):
        return None
    if init.__qualname__.startswith("__create_fn__") or not hasattr(init, "__code__"):
        return None
    try:
        node = definition(init)
    except (OSError, TypeError, SyntaxError):
        return None  # generated: a dataclass
    return node if isinstance(node, Function) else None


def documented_fields(node: ast.ClassDef) -> Iterator[str]:
    """Fields with a string below them, which describes them."""
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or ast.unparse(item.target).startswith("_"):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
            yield f"- `{ast.unparse(item.target)}: {ast.unparse(item.annotation)}`: {prose(text)}"


def constructor(node: ast.ClassDef) -> Function:
    """The one that a dataclass or a NamedTuple gets from its fields."""
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and ast.unparse(item.target)[0] != "_"]
    shown = (
        f"{ast.unparse(item.target)}: {ast.unparse(item.annotation)}"
        + (f" = {ast.unparse(item.value)}" if item.value is not None else "")
        for item in fields
    )
    made = ast.parse(f"def __init__({', '.join(shown)}): ...").body[0]
    assert isinstance(made, Function)
    return made


def definition(value: Any) -> ast.stmt:
    """The syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


def overloaded(node: Function) -> bool:
    return any(ast.unparse(decorator) in ("overload", "typing.overload") for decorator in node.decorator_list)


def signature(name: str, node: Function, skip_first: bool = False) -> str:
    arguments = node.args
    if skip_first:
        del (arguments.posonlyargs or arguments.args)[:1]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    line = f"{name}({', '.join(parameters(arguments))}){returns}"
    if len(line) > WIDEST:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters(arguments)) + f"){returns}"
    return f"```python\n{line}\n```\n\n"


def parameters(arguments: ast.arguments) -> list[str]:
    """Each parameter with its type and default."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    shown = [with_default(parameter, default) for parameter, default in zip(positional, defaults, strict=True)]
    if arguments.vararg is not None:
        shown.append(f"*{ast.unparse(arguments.vararg)}")
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [with_default(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return shown + ([f"**{ast.unparse(arguments.kwarg)}"] if arguments.kwarg is not None else [])


def with_default(parameter: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if parameter.annotation is not None else "="
    return ast.unparse(parameter) + (f"{equals}{ast.unparse(default)}" if default is not None else "")


def docstring(text: str, first_only: bool = False) -> str:
    """A docstring as Markdown: its sections with their entries as lists, formulas as they stand."""
    lines = inspect.cleandoc(text).splitlines()
    if first_only:
        return prose("\n".join(lines).split("\n\n")[0])
    out: list[str] = []
    position = 0
    while position < len(lines):
        found = HEADING.match(lines[position])
        position += 1
        if found is None:
            line = lines[position - 1]
            out.append(line if line.startswith("    ") else prose(line))
            continue
        body = []
        while position < len(lines) and (not lines[position] or lines[position].startswith(" ")):
            body.append(lines[position])
            position += 1
        text = textwrap.dedent("\n".join(body)).strip("\n")
        told = [prose(text)] if found[1] in ("Returns", "Yields") else entries(text)
        out += [f"**{found[1].replace('Args', 'Arguments')}**", "", *told, ""]
    return "\n".join(out).strip("\n") + "\n"


def entries(body: str) -> Iterator[str]:
    """The entries of a section; a line that is indented goes on with the one before it."""
    for part in re.split(r"\n(?=\S)", body.strip("\n")):
        joined = " ".join(line.strip() for line in part.splitlines())
        found = ENTRY.match(joined)
        if found:
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            yield f"- {names}: {prose(found[2])}"
        else:
            yield prose(joined)


def prose(text: str) -> str:
    """References as code, and nothing that Markdown would take for markup."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<])", r"\\\1", piece) for piece in pieces)


if __name__ == "__main__":
    main()
