"""The options of one call of `stream`, `generate` or `send`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

from edge.errors import InputError
from edge.sampler import SamplingOptions

__all__ = ["Options", "Request"]

#: progress(done, total): tokens of the prompt, called before the first and after each chunk.
Progress = Callable[[int, int], None]


class Options(TypedDict, total=False):
    """Keyword arguments of a call: the fields of `Request`, for type checkers."""

    max_tokens: int | None
    stop: str | Sequence[str]
    sampling: SamplingOptions
    logprobs: int
    special: bool
    reuse: bool
    progress: Progress | None


@dataclass(frozen=True)
class Request:
    """Checked options. Raises InputError for a value that cannot be.

    max_tokens: at most so many tokens, None: until the model ends or the context is full.
    stop: strings that end the answer and are not part of it, wherever token borders fall.
    sampling: how tokens are chosen. logprobs: n > 0 gives each token's log-probability and those
    of the n best. special: control tokens written in the prompt count as such. reuse: the prompt
    is the whole conversation; what it shares with the start of the session is not computed again,
    the rest of the session is dropped. progress: see `Progress`.
    """

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    logprobs: int = 0
    special: bool = False
    reuse: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_count("max_tokens", self.max_tokens)
        _check_count("logprobs", self.logprobs)
        if not isinstance(self.sampling, SamplingOptions):
            raise InputError(f"sampling must be SamplingOptions, not {self.sampling!r}")
        if self.progress is not None and not callable(self.progress):
            raise InputError(f"progress must be a function of (done, total), not {self.progress!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            raise InputError("stop must be a string or several, none of them empty")
        object.__setattr__(self, "stop", stop)

    def but(self, options: Options) -> Request:
        """These options with some replaced. Raises InputError for one that does not exist."""
        names = [f.name for f in fields(self)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise InputError(f"no option {unknown[0]!r}, there are {', '.join(names)}")
        return Request(**{**{name: getattr(self, name) for name in names}, **options})


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{name} is {value!r}, it must be a whole number from 0")
