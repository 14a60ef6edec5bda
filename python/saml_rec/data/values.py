"""How the values of sparse, multi and sequence columns are spelled: one id for one value, in whatever file it stands.

Text is its own id. Numbers are spelled as integers are where they are whole, and truth values ``true`` and ``false``,
whether they come as such or as the text that other programs write of them.
"""

import ast
import json

import polars as pl

from saml_rec.data.refusal import Where, refuse
from saml_rec.errors import InputError, named

TRUTH = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false"}
"""Other programs' spellings of truth values."""
EXACT: dict[type[pl.DataType], int] = {pl.Float64: 2**53, pl.Float32: 2**24}
"""Below it a float of the type holds every whole number; from there on two ids may have become one."""
EXACT_OF_OTHERS = 2**11

_QUOTED = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'"""
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_VALUE = f"(?s:{_QUOTED}|{_NUMBER}|[Tt]rue|[Ff]alse|None|null|[Nn]a[Nn])"
_SQUARE = rf"\[\s*(?:{_VALUE}\s*(?:,\s*{_VALUE}\s*)*,?\s*)?\]"
_ROUND = rf"\(\s*(?:(?:{_VALUE}\s*,\s*)+(?:{_VALUE}\s*)?)?\)"
_CURLY = rf"\{{\s*{_VALUE}\s*(?:,\s*{_VALUE}\s*)*,?\s*\}}|set\(\)"
_LIST = rf"^\s*(?:{_SQUARE}|{_ROUND}|{_CURLY})\s*$"
"""A list as Python or JSON writes it, or Python's tuple or set: (1) and {} are neither."""
_SET = rf"^\s*(?:{_CURLY})\s*$"
_OPENED = r"^\s*(?:[\[({]|set\()"
_BRACKETED = r"(?s)^\s*\[.*\]\s*$"
_NO_VALUE = ("None", "null", "nan", "NaN")


def single_values(column: pl.Series, where: Where) -> pl.Series:
    """Any column of single values as String, null where the cell is empty.

    Raises:
        InputError: the column holds no single values, or a whole float that may stand for several ids.
    """
    dtype = column.dtype
    if dtype.is_nested() or dtype == pl.Object:
        raise InputError(f"{where} holds {named(dtype)}; expected one value in each row")
    if dtype.is_float():
        is_inexact = column.to_frame().select(_is_inexact(pl.col(column.name), dtype)).to_series()
        refuse(is_inexact, column, where, _exact(dtype))
    text = _evaluate(column, _spelled(pl.col(column.name), dtype), where)
    return text.replace(TRUTH) if text.is_in(list(TRUTH)).any() else text


def value_lists(column: pl.Series, separator: str, where: Where, *, in_order: bool) -> pl.Series:
    """A bag or a sequence: cells of separated values stay text, lists become lists of text.

    Where a cell of text is a list as Python or JSON writes it, or a tuple or set of Python, all cells of the column
    become lists.

    Args:
        column: of text or lists.
        separator: between the values of text.
        where: for messages.
        in_order: whether the order of the values counts, so that a set is none.

    Raises:
        InputError: the column holds lists of lists, a whole float that may stand for several ids, text in square
            brackets that is no list, or a set where the order counts.
    """
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not isinstance(column.dtype, pl.List):
        text = single_values(column, where)
        if in_order:
            refuse(text.str.contains(_SET).fill_null(False), text, where, "values in order, of which a set has none")
        return _lists_from_text(text, separator, where)
    inner = column.dtype.inner
    assert isinstance(inner, pl.DataType)
    if inner.is_nested() or inner == pl.Object:
        raise InputError(f"{where} holds {named(column.dtype)}; expected lists of single values")
    if inner.is_float():
        is_inexact = _of_each(column, _is_inexact(pl.element(), inner)).list.any().fill_null(False)
        refuse(is_inexact, column, where, f"lists of which each value is {_exact(inner)}")
    lists = _evaluate(column, pl.col(column.name).list.eval(_spelled(pl.element(), inner)), where)
    has_truth = lists.explode().is_in(list(TRUTH)).any()
    return _of_each(lists, pl.element().replace(TRUTH)) if has_truth else lists


def as_lists(column: pl.Series, separator: str) -> pl.Series:
    """What :func:`value_lists` gives as List(String) in every case; an empty cell is null, an empty piece stays."""
    return column.str.split(separator) if column.dtype == pl.String else column


def _lists_from_text(text: pl.Series, separator: str, where: Where) -> pl.Series:
    is_list = _is_list(text, separator, where) if text.str.contains(_OPENED).any() else None
    if is_list is None or not is_list.any():
        has_truth = text.str.contains_any(list(TRUTH)).any()
        return _of_each(text.str.split(separator), pl.element().replace(TRUTH)) if has_truth else text
    tokens = text.set(~is_list, None).str.extract_all(_VALUE)
    is_inexact = _of_each(tokens, _is_inexact(_floats(pl.element()), pl.Float64())).list.any().fill_null(False)
    refuse(is_inexact, text, where, f"a list of which each value is {_exact(pl.Float64())}")
    lists = _of_each(tokens, _value_of_token(pl.element(), _unescaped(tokens, where)))
    return lists.zip_with(is_list, _of_each(text.str.split(separator), pl.element().replace(TRUTH)))


def _is_list(text: pl.Series, separator: str, where: Where) -> pl.Series:
    """Which cells are lists as Python or JSON write them; others in brackets are refused."""
    is_list = text.str.contains(_LIST).fill_null(False)
    # "[a]|[b]" are two values in brackets.
    is_no_list = text.str.contains(_BRACKETED) & ~is_list & ~text.str.contains(f"]{separator}[", literal=True)
    expected = f'values separated by {named(separator)}, or a list of them such as ["a", "b"] or [1, 2]'
    refuse(is_no_list.fill_null(False), text, where, expected)
    return is_list


def _of_each(lists: pl.Series, expression: pl.Expr) -> pl.Series:
    return lists.to_frame().select(pl.col(lists.name).list.eval(expression)).to_series()


def _is_quoted(token: pl.Expr) -> pl.Expr:
    return token.str.starts_with('"') | token.str.starts_with("'")


def _floats(token: pl.Expr) -> pl.Expr:
    """Of a list's tokens those that are numbers but not integers, null for others."""
    return pl.when(token.str.contains("[.eE]")).then(token).cast(pl.Float64, strict=False)


def _value_of_token(token: pl.Expr, unescaped: dict[str, str]) -> pl.Expr:
    floats = _floats(token)
    value = (
        pl.when(_is_quoted(token))
        .then(token.str.head(-1).str.tail(-1))
        .when(floats.is_not_null())
        .then(_spelled(floats, pl.Float64()))
        .when(~token.is_in(_NO_VALUE))
        .then(token)
        .replace(TRUTH)
    )
    if unescaped:
        has_escape = token.is_in(list(unescaped))
        value = pl.when(has_escape).then(token.replace(unescaped)).otherwise(value)
    return pl.when(value != "").then(value)


def _unescaped(tokens: pl.Series, where: Where) -> dict[str, str]:
    """What the quoted tokens with a backslash in them say, as JSON or else as Python."""
    with_escape = tokens.drop_nulls().explode().drop_nulls().unique()
    result = {}
    for token in with_escape.filter(with_escape.str.contains("\\", literal=True)):
        try:
            result[token] = json.loads(token)
        except ValueError:
            try:
                result[token] = ast.literal_eval(token)
            except (ValueError, SyntaxError):
                raise InputError(f"{where}: {named(token)} in a list is not text as Python or JSON write it") from None
    return result


def _spelled(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Values as String, null where empty.

    Whole numbers are written without a fraction: a column of integer ids that once had a gap comes as floats.
    """
    text = value.cast(pl.String)
    if dtype.is_float():
        # polars leaves what is no whole number where it rounds Float16.
        wide = value.cast(pl.Float64)
        is_whole = (wide == wide.floor()) & (wide.abs() < EXACT[pl.Float64])
        whole = pl.when(is_whole).then(wide).cast(pl.Int64).cast(pl.String)
        text = pl.when(value.is_not_nan()).then(pl.coalesce(whole, text))
    elif dtype.is_decimal() and dtype.scale:  # type: ignore[attr-defined]
        text = text.str.strip_chars_end("0").str.strip_suffix(".")
    return pl.when(text != "").then(text)


def _is_inexact(value: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    return (value.fill_nan(None).abs() >= _limit(dtype)).fill_null(False)


def _limit(dtype: pl.DataType) -> int:
    return EXACT.get(type(dtype), EXACT_OF_OTHERS)


def _exact(dtype: pl.DataType) -> str:
    return f"an id below 2^{_limit(dtype).bit_length() - 1}, where {dtype} still tells whole numbers apart"


def _evaluate(column: pl.Series, expression: pl.Expr, where: Where) -> pl.Series:
    try:
        return column.to_frame().select(expression.alias(column.name)).to_series()
    except pl.exceptions.PolarsError:
        raise InputError(f"{where} holds {named(column.dtype)} that is not text") from None
