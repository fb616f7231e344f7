"""One checker for every public option, called before anything is read, loaded or run.

The rule: **an option is taken in the type that it means, and in no other.**

    a whole number   int, and numpy's integers; neither True nor 4096.0 nor "4096"
    a number         int, float, and numpy's; neither NaN nor True nor "0.7"
    yes or no        bool, and numpy's
    text             str that is valid Unicode
    a path           str, os.PathLike or bytes; without a NUL
    a size           a whole number of bytes, or text with a unit, "1.5GB"
    a choice         one of the words that the message lists
    None             where the option gives it a meaning, most often: the default

Numbers as text are refused. TOML and JSON have numbers of their own, and a program that reads a
form or an environment variable converts the text itself, so it can report text that is no number.
The message of the error says what to write instead. A refused value raises InputError, which names
the option and the value. An accepted value is returned as a plain int, float, bool or str, so that
no other code sees other types.
"""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from edge.errors import InputError, brief
from edge.sizes import parse_size

__all__ = [
    "MOST",
    "choice",
    "flag",
    "function",
    "mappings",
    "names",
    "number",
    "optional",
    "path",
    "plain",
    "size",
    "text",
    "texts",
    "tokens",
    "whole",
]

#: The largest whole number that is accepted: the largest signed one of 64 bits.
MOST = 2**63 - 1

_MAX_NESTING = 64  # levels of lists and dicts in a value that becomes plain


def whole(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """A whole number from `least` to `most`."""
    if _is(value, numbers.Integral) and least <= value <= most:
        return int(value)
    is_large = _is(value, numbers.Integral) and value > most
    to = f" to {most}" if most != MOST or is_large else ""
    raise _refused(name, value, f"a whole number from {least}{to}", _as_whole(value))


def number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """A number from low to high. above: whether low itself is refused."""
    if _is(value, numbers.Real) and low <= value <= high and not (above and value == low):
        return float(value)  # NaN is in no range
    must = f"a number {'above' if above else 'from'} {low} to {high}"
    raise _refused(name, value, must, _as_number(value))


def flag(name: str, value: Any) -> bool:
    """True or False."""
    kind = type(value)
    if kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")):
        return bool(value)
    raise _refused(name, value, "True or False")


def text(name: str, value: Any) -> str:
    """Text that is valid Unicode; it may be empty."""
    if not isinstance(value, str):
        raise _refused(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refused(name, value, "valid Unicode, without lone surrogates") from None
    return str(value)


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, none of them empty."""
    several = (value,) if isinstance(value, str) else value
    must = "a string or several, none of them empty"
    if not isinstance(several, (Sequence, set, frozenset)) or isinstance(several, _BYTES):
        raise _refused(name, value, must)
    if not all(isinstance(item, str) and item for item in several):
        raise _refused(name, value, must)
    return tuple(text(name, item) for item in several)


def path(name: str, value: Any) -> str:
    """A path, as text."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise _refused(name, value, "a path")
    try:
        decoded = os.fsdecode(value)
        os.fsencode(decoded)
    except (TypeError, ValueError):  # an os.PathLike that gives no path, a lone surrogate
        raise _refused(name, value, "a path") from None
    if "\0" in decoded:
        raise _refused(name, value, "a path, without a NUL")
    return decoded


def size(name: str, value: Any) -> int:
    """Bytes, from 1; text as `edge.sizes.parse_size` reads it."""
    if isinstance(value, str):
        parsed = parse_size(value, name)
        whole(name, parsed, 1)
        return parsed  # a Size, which remembers how it was written
    if _is(value, numbers.Integral):
        return whole(name, value, 1)
    raise _refused(name, value, 'a whole number of bytes, or a size as "1.5GB"')


def choice(name: str, value: Any, words: Iterable[str]) -> str:
    """One of some words."""
    words = tuple(words)
    if isinstance(value, str) and value in words:
        return str(value)
    raise InputError(f"{name} {brief(value)}: one of {', '.join(words)}")


def function(name: str, value: Any, arguments: str) -> Any:
    """A function. arguments: the arguments that it takes, for the message."""
    if callable(value):
        return value
    raise _refused(name, value, f"a function of {arguments}")


def mappings(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of dicts, copied."""
    if (
        isinstance(value, Sequence)
        and not isinstance(value, (str, *_BYTES))
        and all(isinstance(item, Mapping) for item in value)
    ):
        return [dict(item) for item in value]
    raise _refused(name, value, "a list of dicts")


def plain(name: str, value: Any, quote: Callable[[str], str] = str, *, depth: int = 0) -> Any:
    """A deep copy of a value, made only of the types of JSON: str, int, float, bool, None, list and
    dict.

    quote: applied to each text, keys included. depth: levels of nesting above the value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return quote(str(value))
    for kind in (int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if depth > _MAX_NESTING:
        raise InputError(f"{name} is nested more than {_MAX_NESTING} levels deep")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"{name} has a key that is not text")
        return {
            quote(str(key)): plain(name, item, quote, depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(name, item, quote, depth=depth + 1) for item in value]
    raise InputError(f"{name} holds a {type(value).__name__}; only JSON values can be rendered")


def tokens(name: str, value: Any, n_vocab: int) -> list[int]:
    """Token ids of a vocabulary of n_vocab tokens."""
    is_list = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    is_list = is_list and getattr(value, "ndim", 1) == 1  # numpy's
    if not is_list or isinstance(value, (str, Mapping, *_BYTES)):
        raise _refused(name, value, "text or a list of token ids")
    ids = []
    for i, token in enumerate(value):
        if not _is(token, numbers.Integral):
            raise InputError(f"{brief(token)} at {i} of {name} is no token id: a whole number")
        if not 0 <= token < n_vocab:
            raise InputError(
                f"token {brief(token)} at {i} of {name} is outside the vocabulary of {n_vocab}"
            )
        ids.append(int(token))
    return ids


def names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError for an option that does not exist."""
    known = tuple(known)
    for name in sorted(set(given) - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        hint = f": did you mean {near[0]!r}? There are" if near else ", there are"
        raise InputError(f"no option {brief(name)}{hint} {', '.join(known)}")


def optional(check: Callable[..., Any], name: str, value: Any, *rest: Any) -> Any:
    """None, or a value that `check` accepts; rest: further arguments of `check`."""
    return None if value is None else check(name, value, *rest)


_BYTES = (bytes, bytearray, memoryview)


def _is(value: Any, kind: type) -> bool:
    """Whether this is a number of the kind. Python's bool is an int, but is refused as a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _as_whole(value: Any) -> str | None:
    """The whole number that a float or a text stands for, for the message; None: there is none."""
    if isinstance(value, str) and len(value) < 20:
        stripped = value.strip()
        return stripped if stripped.isascii() and stripped.lstrip("+-").isdigit() else None
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < MOST
    return str(int(value)) if is_whole else None


def _as_number(value: Any) -> str | None:
    """The number that a text stands for, for the message; None: there is none."""
    try:
        return repr(float(value)) if isinstance(value, str) and len(value) < 40 else None
    except ValueError:
        return None


def _refused(name: str, value: Any, must: str, instead: str | None = None) -> InputError:
    hint = f": write {instead}" if instead is not None else ""
    return InputError(f"{name} is {brief(value)}, it must be {must}{hint}")
