"""What a call gives back: pieces while it runs, a completion at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["Completion", "FinishReason", "Piece", "TokenLogprob", "Usage"]

#: stop: the model ended, or a stop string came; length: max_tokens; context: no room for more.
FinishReason = Literal["stop", "length", "context", "cancelled"]


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability, before penalties and temperature."""

    token: int
    logprob: float


class Piece(NamedTuple):
    """One step of an answer: one token, and the text that became certain with it.

    text: may be empty, while a character is not complete or a stop string may be on its way.
    token: None for text that was held back until the end. logprob: of this token, None where no
    log-probabilities were asked for. top: the best tokens of this step, best first.
    """

    text: str
    token: int | None = None
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a call cost, in tokens and seconds. Time that the caller took between pieces is not in.

    prompt_tokens: all tokens before the answer; cached_tokens: how many of them the cache held
    already. decode_steps: tokens that the model was run on one by one (the first token of an
    answer comes out of the prompt, the last is not run).
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompt that were computed, by the time it took; 0.0 for none."""
        n = self.prompt_tokens - self.cached_tokens
        return n / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Steps of one token, by the time they took; 0.0 for none."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True)
class Completion:
    """An answer. tokens: those that it was made of, a stop string's included, without the token
    that ended it; logprobs: one Piece for each of them where log-probabilities were asked for.
    seed: what they were drawn with, of a random seed the one that came; None at temperature 0,
    where nothing is drawn.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    usage: Usage
    logprobs: tuple[Piece, ...] = ()
    seed: int | None = None
