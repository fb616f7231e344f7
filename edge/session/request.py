"""The options of one call of `stream`, `generate` or `send`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypedDict

from edge import check
from edge.errors import InputError, brief
from edge.progress import Progress
from edge.session.sampler import SamplingOptions

__all__ = ["CallOptions", "Request"]


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a call: the fields of `Request`, for type checkers."""

    max_tokens: int | None
    stop: str | Sequence[str]
    sampling: SamplingOptions
    logprobs: int
    special: bool
    reuse: bool
    variables: Mapping[str, Any]
    progress: Progress | None


@dataclass(frozen=True)
class Request:
    """The options of a call, checked. Raises InputError for a value that cannot be.

    max_tokens: at most so many tokens, None: until the model ends or the context is full.
    stop: strings that end the answer and are not part of it, wherever token borders fall.
    sampling: how tokens are chosen. logprobs: n > 0 gives each token's log-probability and those
    of the n best. special: control tokens written in the prompt count as such. reuse: the prompt
    is the whole conversation; what it shares with the start of the session is not computed again,
    the rest of the session is dropped. variables: more names for the template of a chat, such as
    `enable_thinking`. progress: see `Progress`.
    """

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    logprobs: int = 0
    special: bool = False
    reuse: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        checked = {
            "max_tokens": check.optional(check.whole, "max_tokens", self.max_tokens),
            "stop": check.texts("stop", self.stop),
            "logprobs": check.whole("logprobs", self.logprobs),
            "special": check.flag("special", self.special),
            "reuse": check.flag("reuse", self.reuse),
            "variables": _checked_variables(self.variables),
            "progress": check.optional(check.function, "progress", self.progress, "(done, total)"),
        }
        if not isinstance(self.sampling, SamplingOptions):
            raise InputError(f"sampling is {brief(self.sampling)}, it must be SamplingOptions")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def but(self, options: CallOptions) -> Request:
        """A copy with some options replaced. Raises InputError for one that does not exist."""
        names = [f.name for f in fields(self)]
        check.names(options, names)
        return Request(**{**{name: getattr(self, name) for name in names}, **options})

    def settled(self, n_vocab: int, recommended: SamplingOptions) -> Request:
        """A copy for one call, in which all of sampling is a number that a session's file keeps.

        recommended: what counts where these options say nothing. Raises InputError for a logit_bias
        that is not for a vocabulary of n_vocab.
        """
        self.sampling.check_vocabulary(n_vocab)
        return replace(self, sampling=self.sampling.settled(recommended))

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON, see `edge.session.restore`; without `progress`, a function."""
        sampling = asdict(self.sampling)
        sampling["logit_bias"] = list(self.sampling.logit_bias.items())
        return {
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "sampling": sampling,
            "logprobs": self.logprobs,
            "special": self.special,
            "reuse": self.reuse,
            "variables": self.variables,
        }


def _checked_variables(variables: Any) -> dict[str, Any]:
    if not isinstance(variables, Mapping) or not all(isinstance(k, str) for k in variables):
        raise InputError(f"variables is {brief(variables)}, it must be a dict of names")
    return {name: check.plain(f"variable {name!r}", value) for name, value in variables.items()}
