"""The tokens of a session and the cache of their keys and values, kept in step."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edge.errors import ContextError
from edge.session.overlap import common_prefix

if TYPE_CHECKING:
    from edge.backend import Cache
    from edge.tokenizer import Tokenizer

__all__ = ["Transcript"]


class Transcript:
    """The tokens of a session, and the cache of the keys and values of the first of them.

    Between two native calls the cache holds the first `cache.length` of the tokens, whatever
    happened: tokens are appended before they are run, and a cut is made in the cache first. So an
    exception, Ctrl-C or a stream that nobody finishes leaves nothing to repair.

    tokens: ids, oldest first; read them, and change them by the methods here only. n_context:
    positions that are in memory at a time. on_cut: called before each cut with the number of
    tokens that stay; None: nobody needs to know.
    """

    def __init__(self, cache: Cache, n_context: int) -> None:
        self.cache, self.n_context = cache, n_context
        self.tokens = array("i")
        self.on_cut: Callable[[int], None] | None = None

    # ---- changes ----

    def append(self, tokens: Sequence[int]) -> None:
        """Put tokens behind the others; they are run later."""
        self.tokens.extend(tokens)

    def cut(self, n_tokens: int) -> None:
        """Keep the first n_tokens tokens, or all where there are fewer."""
        if self.on_cut is not None:
            self.on_cut(n_tokens)
        if self.cache.length > n_tokens:
            self.cache.trim(n_tokens)
        del self.tokens[n_tokens:]

    def adopt(self) -> None:
        """Get ready to run what is left: take over what other caches have computed of these tokens.
        The last token is always left, because its logits are wanted.
        """
        last = len(self.tokens) - 1
        if self.cache.length > last:
            self.cache.trim(last)
        self.cache.adopt(self.tokens[:last])

    def fork(self) -> Transcript:
        """Another transcript with the same content, which shares the memory of the cache.

        Raises MemoryBudgetError.
        """
        twin = Transcript(self.cache.fork(), self.n_context)
        twin.append(self.tokens)
        return twin

    # ---- what it holds ----

    @property
    def most_tokens(self) -> int:
        """The most tokens that there can be: all that can be run, and the one that they led to."""
        return self.cache.limit + 1

    @property
    def is_full(self) -> bool:
        """Whether no token can come any more: the last one cannot be run."""
        return len(self.tokens) >= self.most_tokens

    def common_prefix(self, tokens: Sequence[int]) -> int:
        """How many of its first tokens are the first of these."""
        return common_prefix(self.tokens, tokens)

    def next_chunk(self, most: int) -> Sequence[int]:
        """The first tokens that the cache does not hold yet, as many as one run may take; at most
        so many.
        """
        start = self.cache.length
        return self.tokens[start : start + self.cache.room(most)]

    def can_cut(self, n_tokens: int) -> bool:
        """Whether the next token sees all that it should after a cut to n_tokens. It does not where
        that was given back behind a window: then all that came after would be computed anew.
        """
        return n_tokens >= self.cache.length or self.cache.holds(n_tokens)

    # ---- what fits ----

    def room(self, *, reuse: bool) -> int:
        """The most tokens that a prompt may have. reuse: it takes the place of what is held."""
        n_held = len(self.tokens)
        room = self.cache.limit - (0 if reuse else n_held)
        if self.cache.when_full == "slide":
            room = min(room, self.n_context + (n_held if reuse else 0))
        return max(room, 0)

    def check_text(self, text: str, tokenizer: Tokenizer, *, reuse: bool) -> None:
        """Raise ContextError for a text that cannot fit, however it is encoded."""
        if len(text) > tokenizer.most_bytes(self.room(reuse=reuse)):
            n_tokens = -(-len(text) // tokenizer.most_bytes(1))
            n_common = len(self.tokens) if reuse else None
            self.check_fits(n_tokens, n_common, at_least=True)

    def check_fits(self, n_prompt: int, n_common: int | None, *, at_least: bool = False) -> None:
        """Raise ContextError when a prompt of n_prompt tokens, or at_least so many, does not fit.

        n_common: tokens of the prompt that are held already; None: it goes behind those held.
        """
        limit, slides = self.cache.limit, self.cache.when_full == "slide"
        n_tokens = n_prompt + (len(self.tokens) if n_common is None else 0)
        n_new = n_prompt - (n_common or 0)
        hint = "shorten the prompt, or load the model with a larger context"
        what = f"the context of {limit} holds"
        if slides and n_new > self.n_context:
            n_tokens, limit = n_new, self.n_context
            what = f"a context of {limit} takes at once"
        elif slides:
            what = f"the {limit} positions that the model has"
            hint = "start a new session"
        if n_tokens > limit:
            raise ContextError(
                f"{'at least ' * at_least}{n_tokens} tokens are {n_tokens - limit} more than "
                f"{what}: {hint}",
                needed=n_tokens,
                limit=limit,
                at_least=at_least,
            )
