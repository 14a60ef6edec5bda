"""Options of train in a TOML file: what --config reads, and what a run keeps as run.toml."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from saml_rec.errors import InputError, did_you_mean, shortened, shown
from saml_rec.toml_file import read_toml

Command = Any
NOT_KEPT = ("out", "resume", "overwrite", "config", "tensorboard", "mlflow")
"""Options that do not say what a run comes to."""


def config_option(command: Command) -> Command:
    """Defaults of all other options from a file."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="TOML file with options, by their names; options of the command line go before it.",
    )(command)


def _read(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None or ctx.resilient_parsing:
        return
    options = {option.opts[0].removeprefix("--"): option for option in ctx.command.params if option.opts}
    del options["config"]
    found: dict[str, Any] = {}
    for key, value in read_toml(path, "file of options").items():
        name = key.replace("_", "-")
        if name not in options:
            raise InputError(f"{path}: there is no option {shown(key)}{did_you_mean(name, options)}")
        option = options[name]
        if option.name in found:
            raise InputError(f"{path}: {name} is given twice, with - and with _ in its name")
        found[str(option.name)] = _given(path, name, value, option)
    ctx.default_map = found


def _given(path: Path, name: str, value: Any, option: click.Parameter) -> Any:
    """What the command line would have had, once it is known to be right."""
    is_flag = isinstance(option, click.Option) and option.is_flag
    if is_flag != isinstance(value, bool) and not (
        isinstance(value, bool) and isinstance(option.type, click.types.BoolParamType)
    ):
        raise InputError(f"{path}: {name} must be {_expected(option)}, got {shown(value)}")
    if is_flag:
        return value
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) for each in values):
        raise InputError(f"{path}: {name} must be {_expected(option)}, got {shown(value)}")
    texts = [str(each) for each in values]
    given: Any = texts
    if not option.multiple:
        if isinstance(value, list) and not _is_list(option):
            raise InputError(f"{path}: {name} must be {_expected(option)}, got {shown(value)}")
        given = ",".join(texts) or "none"
    try:
        for each in texts if option.multiple else [given]:
            option.type.convert(each, option, None)
    except click.BadParameter as error:
        raise InputError(f"{path}: {name}: {shortened(error.message)}") from error
    return given


def _is_list(option: click.Parameter) -> bool:
    """Whether it takes several values separated by commas."""
    metavar = option.type.get_metavar(option, click.Context(click.Command("train")))
    return metavar is not None and metavar.endswith(",...")


def _expected(option: click.Parameter) -> str:
    if isinstance(option, click.Option) and option.is_flag:
        return "true or false"
    return "a value or a list of them" if option.multiple or _is_list(option) else "one value"


def kept(ctx: click.Context, trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a command as a file that --config reads: paths in full, without those that are not set.

    A path that is no text is left out, as TOML has no notation for it.

    Args:
        ctx: of the command.
        trained_with: what options came to, by their parameters' names, such as the model's own defaults.
    """
    # In the order of the command; what was not given of options that may be repeated is ().
    given = {str(option.name): ctx.params.get(str(option.name)) for option in ctx.command.params}
    return dict(_kept({name: value for name, value in given.items() if value != ()} | dict(trained_with)))


def _kept(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if name in NOT_KEPT or value is None:
            continue
        plain = [_plain(each) for each in value] if isinstance(value, tuple | list) else _plain(value)
        if not any("\udc80" <= letter <= "\udcff" for letter in str(plain)):
            yield name.replace("_", "-"), plain


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, tuple):
        # Of --table-lr: a feature, or None, and a rate.
        feature, rate = value
        return f"{rate!r}" if feature is None else f"{feature}={rate!r}"
    return value
