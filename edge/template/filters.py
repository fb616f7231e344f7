"""The filters that a template may use: some of jinja2's, each with a check, and a few of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import GeneratorType
from typing import Any

from jinja2 import pass_context
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from markupsafe import escape

from edge.template.budget import ITEM_BYTES, LIST_BYTES, Budget, Refused, n_bytes, running
from edge.template.text import TEXT_METHODS, as_text, check_percent

__all__ = ["allowed_filters"]

MAX_DIGITS = 4300  # of a number written as text; the limit of Pythons that have one
MAX_COUNT = 100_000  # as jinja2's own for range()


def _names(text: str) -> list[str]:
    return text.split()


# A filter without a row in _CHECKS makes no value that is bigger than its arguments.
_FROM_JINJA = _names(
    "abs attr batch capitalize count d default dictsort first float groupby indent int items last "
    "length list lower map max min reject rejectattr replace reverse round select selectattr "
    "slice sort sum title trim truncate unique upper wordcount"
)

_Check = Callable[..., None]


def _walk(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    """For filters that split a text into a list of its characters or words."""
    if isinstance(value, str):
        budget.reserve(ITEM_BYTES * len(value))


def _count(budget: Budget, value: Any, n: Any = 0, *_: Any, **names: Any) -> None:
    """batch(linecount, fill_with) and slice(slices, fill_with)."""
    _walk(budget, value)
    for count in (n, *names.values()):
        if isinstance(count, int) and count > MAX_COUNT:
            raise Refused(f"a count of more than {MAX_COUNT:,}")


def _digits(budget: Budget, value: Any, *_: Any, **__: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_DIGITS:
        raise Refused(f"a number of more than {MAX_DIGITS} characters")


def _precision(budget: Budget, value: Any, *places: Any, **names: Any) -> None:
    for n in (*places, *names.values()):
        if isinstance(n, int) and abs(n) > 100:
            raise Refused("a precision of more than 100 digits")


def _start(budget: Budget, value: Any, *parts: Any, **names: Any) -> None:
    """sum(attribute, start): only of numbers, because lists would be copied again and again."""
    start = names.get("start", parts[1] if len(parts) > 1 else 0)
    if not isinstance(start, (int, float)):
        raise Refused("a sum of values that are not numbers")


def _replaced(budget: Budget, s: Any, old: Any, new: Any, count: Any = None) -> None:
    budget.reserve(TEXT_METHODS["replace"](as_text(s), as_text(old), as_text(new)))


def _trimmed(budget: Budget, value: Any, chars: Any = "") -> None:
    budget.reserve(TEXT_METHODS["strip"](as_text(value), chars))


def _indented(budget: Budget, s: Any, width: Any = 4, *_: Any, **names: Any) -> None:
    value = as_text(s)
    _walk(budget, value)
    n = 4 * width if isinstance(width, int) else n_bytes(as_text(width))
    budget.reserve(n_bytes(value) + n * (value.count("\n") + 1))


def _texts(budget: Budget, value: Any, *parts: Any, **names: Any) -> None:
    """For filters that turn every argument into text."""
    for part in (value, *parts, *names.values()):
        as_text(part)


_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(
        _names(
            "first groupby last list map max min reject rejectattr reverse select selectattr sort "
            "title unique wordcount"
        ),
        _walk,
    ),
    **dict.fromkeys(_names("capitalize lower upper"), _texts),
    "batch": _count,
    "float": _digits,
    "indent": _indented,
    "int": _digits,
    "replace": _replaced,
    "round": _precision,
    "slice": _count,
    "sum": _start,
    "trim": _trimmed,
    "truncate": _texts,
}


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its check before it, and its result paid for."""
    leading = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    check = _CHECKS.get(name)

    @pass_context
    def filtered(context: Context, value: Any, *args: Any, **names: Any) -> Any:
        budget = running()
        budget.step()
        if check is not None:
            check(budget, value, *args, **names)
        lead = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(leading, ())
        result = function(*lead, value, *args, **names)
        if isinstance(result, GeneratorType):
            return budget.iterate(result)
        return budget.made(result)

    return filtered


def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    """jinja2's join, but its size is checked first."""
    budget = running()
    items = budget.listed(value)
    if attribute is not None:
        parts = [str(attribute).split(".")] * len(items)
        items = [_lookup(context, item, keys) for item, keys in zip(items, parts, strict=True)]
    texts, separator = list(map(as_text, items)), as_text(d)
    budget.reserve(TEXT_METHODS["join"](separator, texts))
    return separator.join(texts)


def _lookup(context: Context, item: Any, keys: list[str]) -> Any:
    for key in keys:
        item = context.environment.getitem(item, int(key) if key.isdigit() else key)
    return item


def _format(context: Context, value: Any, *args: Any, **names: Any) -> str:
    """ "%s and %s"|format(a, b)."""
    text, items = as_text(value), names or args
    check_percent(text, items)
    return text % items


def _center(context: Context, value: Any, width: int = 80) -> str:
    text = as_text(value)
    running().reserve(TEXT_METHODS["center"](text, width))
    return text.center(width)


def _escape(context: Context, value: Any) -> str:
    return str(escape(as_text(value)))


def _string(context: Context, value: Any) -> str:
    return as_text(value)


def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it for templates: without HTML escapes, characters unescaped."""
    budget = running()
    size, depth = budget.weigh(value)
    width = indent if isinstance(indent, int) else len(indent or "")
    marks = sum(map(len, separators)) if separators else 0
    n_items = size // ITEM_BYTES + 1
    budget.reserve(6 * size + n_items * (max(width, 0) * depth + marks))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _fromjson(context: Context, value: Any) -> Any:
    """The value of a JSON text."""
    text = as_text(value)
    containers = text.count("[") + text.count("{")
    running().reserve(
        4 * n_bytes(text)
        + containers * LIST_BYTES
        + (containers + 2 * text.count(",") + text.count(":")) * ITEM_BYTES
    )
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int:
    _digits(running(), digits)
    return int(digits)


_OURS: dict[str, Callable[..., Any]] = {
    "center": _center,
    "e": _escape,
    "escape": _escape,
    "format": _format,
    "from_json": _fromjson,  # as the templates for DeepSeek V3.2 and V4 spell it
    "fromjson": _fromjson,
    "join": _join,
    "safe": _string,
    "string": _string,
    "tojson": _tojson,
}


def allowed_filters() -> dict[str, Callable[..., Any]]:
    """All filters by name, bounded."""
    ours = {name: pass_context(function) for name, function in _OURS.items()}
    known = {name: FILTERS[name] for name in _FROM_JINJA if name in FILTERS}
    return {name: _bounded(name, function) for name, function in {**known, **ours}.items()}
