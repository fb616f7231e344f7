"""Methods and formatting of text: which may be called, and how big the result would be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import repeat
from string import Formatter
from typing import Any

from edge.template.budget import ITEM_BYTES, Refused, joined_bytes, n_bytes, running

__all__ = [
    "OTHER_METHODS",
    "TEXT_METHODS",
    "BoundFormat",
    "as_text",
    "check_format",
    "check_percent",
]


class BoundFormat:
    """The `format` method of a text; only Environment.call can call it."""

    def __init__(self, text: str, function: Callable[..., str]) -> None:
        self.text, self.function = text, function


def as_text(value: Any) -> str:
    """str(value); refused when it would be too long."""
    if type(value) is str:
        return value
    budget = running()
    budget.reserve(4 * budget.size(value))  # repr() spells some characters as \\x00
    text = str(value)
    budget.charge(n_bytes(text))
    return text


def check_format(text: str, args: Iterable[Any]) -> None:
    """Refuse a text.format(*args) with a huge result."""
    running().reserve(len(text) * text.count("{"))  # the time to parse it
    width = n_fields = 0
    for _, field, spec, _ in Formatter().parse(text):
        if field is None:
            continue
        if "{" in (spec or ""):
            raise Refused("a format width that is computed is not allowed")
        n_fields += 1
        width += sum(map(_width, re.findall(r"\d+", spec or "")))
    size = sum(map(_text_size, args))
    running().reserve(n_bytes(text) + 4 * width + n_fields * size)


_PERCENT = re.compile(r"%(\([^)]*\))?[#0\- +]*(\*|\d*)(?:\.(\*|\d*))?[hlL]?(.)", re.DOTALL)


def check_percent(text: str, args: Any) -> None:
    """Refuse a text % args with a huge result."""
    running().reserve(len(text) * text.count("%"))  # the time to parse it
    width = n_fields = 0
    for match in _PERCENT.finditer(text):
        if match[2] == "*" or match[3] == "*" or "(" in (match[1] or "")[1:]:
            raise Refused("a format width that is computed is not allowed")
        n_fields += 1
        width += _width(match[2]) + _width(match[3] or "")
    items = args.values() if isinstance(args, dict) else args if isinstance(args, tuple) else [args]
    size = sum(map(_text_size, items))
    running().reserve(n_bytes(text) + 4 * width + n_fields * size)


def _width(digits: str) -> int:
    if len(digits) > 9:
        raise Refused("a format width of more than 9 digits")
    return int(digits or 0)


def _text_size(value: Any) -> int:
    """The most bytes of str(value)."""
    return (1 if isinstance(value, str) else 4) * running().size(value)


# The most bytes that each method of text makes, or the most steps where time matters more.
# Arguments are named as in str. 0: no more than the text itself, times a small constant.


def _padded(text: str, width: Any, fillchar: Any = " ", /) -> int:
    return 4 * width if isinstance(width, int) else 0


def _replaced(text: str, old: Any, new: Any, count: Any = -1) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        return 0
    return joined_bytes((text, new), (1, text.count(old)))


def _joined(text: str, items: Any, /) -> int:
    return joined_bytes((*items, text), (*repeat(1, len(items)), len(items)))


def _split(text: str, sep: Any = None, maxsplit: Any = -1) -> int:
    pieces = text.count(sep) if isinstance(sep, str) and sep else len(text) // 2
    return n_bytes(text) + ITEM_BYTES * pieces


def _right_split(text: str, sep: Any = None, maxsplit: Any = -1) -> int:
    return max(_split(text, sep), _searched(text, sep))


def _lines(text: str, keepends: Any = False) -> int:
    return _split(text)


def _searched(text: str, needle: Any = "", *_: Any) -> int:
    """Searching from the right, and stripping, take len(text) times len(needle) steps."""
    return len(text) * len(needle) if isinstance(needle, str) else 0


def _tabbed(text: str, tabsize: Any = 8) -> int:
    return n_bytes(text) + 4 * text.count("\t") * tabsize if isinstance(tabsize, int) else 0


def _same(text: str, *_: Any) -> int:
    return 0


_SIMPLE_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit "
    "islower isnumeric isspace istitle isupper lower partition removeprefix removesuffix "
    "startswith swapcase title upper"
)
TEXT_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(_SIMPLE_METHODS.split(), _same),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _padded),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition"), _searched),
    "expandtabs": _tabbed,
    "join": _joined,
    "replace": _replaced,
    "rsplit": _right_split,
    "split": _split,
    "splitlines": _lines,
}
OTHER_METHODS: dict[type, frozenset[str]] = {
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
