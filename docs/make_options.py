"""Writes the table of hyperparameters in docs/cli.md from the models' signatures: python docs/make_options.py"""

import re
from pathlib import Path
from typing import Any

import click

from saml_rec.models.hyperparameters import HYPERPARAMETERS, Hyperparameter
from saml_rec.models.registry import MODELS, hyperparameters

PAGE = Path(__file__).parent / "cli.md"
PLACE = re.compile(r"(<!-- hyperparameters -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """The page with the table made anew."""
    lines = ["| option | default | |", "| --- | --- | --- |", *map(_line, HYPERPARAMETERS.values())]
    return PLACE.sub(lambda match: f"{match[1]}{chr(10).join(lines)}\n{match[2]}", text)


def _line(option: Hyperparameter) -> str:
    models_of: dict[str, list[str]] = {}
    for model in MODELS:
        taken = hyperparameters(model)
        if option.name in taken:
            models_of.setdefault(_shown(taken[option.name]), []).append(model)
    networks = {model for model in MODELS if "hidden_dims" in hyperparameters(model)}
    groups = []
    for value, models in models_of.items():
        named = "all networks" if set(models) == networks else ", ".join(models)
        groups.append(f"`{value}`: {named}")
    kinds = {"boolean": "BOOLEAN", "float": "X", "float range": "X", "integer range": "N"}
    metavar = option.type.get_metavar(click.Option(["--x"]), click.Context(click.Command("x")))
    shown = metavar if isinstance(metavar, str) and not metavar.startswith("[") else kinds.get(option.type.name, "NAME")
    choices = f" ({', '.join(option.type.choices)})" if isinstance(option.type, click.Choice) else ""
    return f"| `--{option.name.replace('_', '-')} {shown}` | {'; '.join(groups)} | {_text(option)}{choices} |"


def _text(option: Hyperparameter) -> str:
    text = option.text.rstrip(".")
    return text[0].lower() + text[1:]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "as hidden" if value is None else str(value)


if __name__ == "__main__":
    main()
