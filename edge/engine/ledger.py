"""The ledger: the memory that a model will take, part by part, before anything is loaded.

The total is an upper bound of the resident memory of the whole process at any time:

    weights           all of them, packed: checking their sums brings every page into memory
    adapters          the matrices of LoRA adapters, packed
    keys and values   the pages of all planned sessions, full; layers with a window need only the
                      pages that a chunk of tokens reaches
    buffers           the buffers of activations
    logits            a row of logits, and the sampler's copies of it
    tokenizer         by the sizes of its lists; building it takes more than it keeps, and the
                      prompt and the template use that memory afterwards
    template          the compiled chat template, and what one rendering may take
    prompt            a prompt as long as the context: its text, its tokens, and the encoding
    history           the tokens beyond the context that sliding sessions keep
    program           the process now, and the modules that it will still import
    packing           what packing at a first start needs beyond the keys and values, buffers and
                      logits, which are not in memory yet
    margin            stacks, the allocator's own memory, unused halves of pages

When a model does not fit, the ledger tries other types of keys and values, layouts and contexts,
and counts each of them; it guesses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edge.device.budget import MARGIN_BYTES, logits_bytes, text_parts
from edge.engine.plan import CHUNK
from edge.errors import MemoryBudgetError
from edge.kv.shape import PAGE, KVLayout, kv_types
from edge.loading import Layout
from edge.sizes import show
from edge.tokenizer.cost import TokenizerBytes

__all__ = ["Ledger", "Option"]

#: Bytes for each token beyond the context in a session that slides: its id in the session and in
#: the cache, 4 bytes each, and about 5 bytes of text while its answer is generated.
_HISTORY_TOKEN_BYTES = 16

#: 1 / _ROOM of the budget: how much more one process of a program may have resident than another,
#: before it does anything.
_ROOM = 128


@dataclass(frozen=True)
class Option:
    """A way to load a model that fits. flags: of the command line; needed: bytes."""

    flags: str
    needed: int


@dataclass(frozen=True)
class Ledger:
    """The plan of a model's memory; sizes in bytes. It counts, and changes nothing.

    weights: packed, in the chosen layout; adapters: packed; least_weights: all in the compact
    layout, where that can be chosen. context: tokens of each session; most_context: positions that
    the model was made for; positions: the most that a session which slides reaches. n_vocab:
    tokens; template: bytes, compiled. packing: what packing needs besides the weights. budget: for
    the whole process; None: the system does not tell; is_stated: the caller stated it.
    """

    path: str
    layout: Layout
    weights: int
    adapters: int
    least_weights: int
    kv: KVLayout
    context: int
    most_context: int
    positions: int
    sessions: int
    buffers: int
    n_vocab: int
    tokenizer: TokenizerBytes
    template: int
    packing: int
    program: int
    budget: int | None
    is_stated: bool

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name; `needed` is their sum."""
        later = {
            "keys and values": self._kv_bytes,
            "buffers": self.buffers,
        }
        later["logits"] = logits_bytes(self.n_vocab)
        adapters = {"adapters": self.adapters} if self.adapters else {}
        return {
            "weights": self.weights,
            **adapters,
            **later,
            **text_parts(self.tokenizer, self.template, self.context),
            "history": self._history,
            "program": self.program,
            "packing": max(0, self.packing - sum(later.values())),
            "margin": MARGIN_BYTES,
        }

    @property
    def _history(self) -> int:
        beyond = max(0, self.positions - self.context)
        return self.sessions * _HISTORY_TOKEN_BYTES * beyond

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether `needed` is within the budget."""
        return self.budget is None or self.needed <= self.budget

    @property
    def planned_pages(self) -> list[int]:
        """Pages of keys and values of all sessions, for each layer group."""
        groups = self.kv.groups
        return [self.sessions * group.most_pages(self.context, CHUNK) for group in groups]

    @property
    def _kv_bytes(self) -> int:
        pages = zip(self.planned_pages, self.kv.groups, strict=True)
        return sum(n * group.shape.page_bytes for n, group in pages)

    @property
    def most_kv_bytes(self) -> int | None:
        """The most bytes of keys and values within a stated budget, for more sessions than were
        planned; None: no budget was stated.
        """
        if self.budget is None or not self.is_stated:
            return None
        return self._kv_bytes + max(0, self.budget - self.needed)

    def with_kv(self, type_name: str) -> Ledger:
        """The same ledger with another type of keys and values."""
        return replace(self, kv=self.kv.with_type(type_name))

    def largest_context(self) -> int:
        """The most tokens that each session can have; 0: none. Layout "auto" may become compact; a
        stated layout stays.
        """
        auto = self._least() if self.layout == "auto" else self
        low, high = 0, -(-self.most_context // PAGE)
        while low < high:
            middle = (low + high + 1) // 2
            fits = replace(auto, context=middle * PAGE).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return min(low * PAGE, self.most_context)

    def options(self) -> list[Option]:
        """Options that would fit, when this ledger does not: first those that change one thing. If
        none of these keeps the context, one that changes all it can, if its context is longer than
        with a shorter context alone. They leave a little room: the next process may find more
        pages of its libraries in memory.
        """
        if self.budget is None:
            return []
        return replace(self, budget=self.budget - self.budget // _ROOM)._options()

    def _options(self) -> list[Option]:
        options = list(self._single_changes())
        if not any("--context" not in option.flags for option in options):
            smallest = [self._least().with_kv(name) for name in self.types()]
            fitting = [ledger for ledger in smallest if ledger.fits]
            longest = max(smallest, key=Ledger.largest_context)
            context = longest.largest_context()
            if fitting:
                options.append(self._option(fitting[0]))
            elif context > self.largest_context():
                options.append(self._option(replace(longest, context=context)))
        return options

    def least(self) -> Option:
        """The option with the least memory with which the model runs at all."""
        least = self._least().with_kv(self.types()[-1])
        least = replace(least, context=min(self.context, PAGE), sessions=1)
        return self._option(least)

    def require(self) -> None:
        """Raise MemoryBudgetError, with options that would fit, unless this ledger fits."""
        if self.fits or self.budget is None:
            return
        names = {"keys and values": f"keys and values of {self._tokens()} in {self.kv.type}"}
        parts = {names.get(name, name): size for name, size in self.parts.items() if size}
        listed = ", ".join(f"{name} {show(size)}" for name, size in parts.items())
        options = " or ".join(f"{o.flags} ({show(o.needed)})" for o in self.options())
        least = self.least()
        hint = f"Try {options}" if options else f"The least that runs is {show(least.needed)}"
        if not options and least.flags:
            hint += f", with {least.flags}"
        limit = "the budget is" if self.is_stated else "there is"
        raise MemoryBudgetError(
            f"{self.path} needs {show(self.needed)}, {limit} {show(self.budget)}: {listed}. {hint}",
            needed=self.needed,
            budget=self.budget,
            parts=self.parts,
        )

    def _single_changes(self) -> Iterator[Option]:
        """Options that change one thing."""
        context = self.largest_context()
        changed = [replace(self, context=context)] if 0 < context < self.context else []
        types = [self.with_kv(name) for name in self.types()]
        types = [t for t in types if t.kv.page_bytes < self.kv.page_bytes]
        changed += [t for t in types if self._auto(t).fits][:1]
        if self.layout == "fast" and self.least_weights < self.weights:
            changed.append(self._least())
        if 0 < (sessions := self._most_sessions()) < self.sessions:
            changed.append(replace(self, sessions=sessions))
        for ledger in map(self._auto, changed):
            if ledger.fits:
                yield self._option(ledger)

    def _most_sessions(self) -> int:
        """How many sessions fit in the budget. Layout "auto" may become compact."""
        one = replace(self._least() if self.layout == "auto" else self, sessions=1)
        rest = replace(one, sessions=0, packing=0).needed
        return max(0, (self.budget or 0) - rest) // (one._kv_bytes + one._history)

    def _auto(self, ledger: Ledger) -> Ledger:
        """A ledger with the smallest layout that "auto" may take, where it needs that to fit."""
        return ledger._least() if self.layout == "auto" and not ledger.fits else ledger

    def _least(self) -> Ledger:
        """The same ledger in the compact layout, where there is a choice."""
        return replace(self, weights=self.least_weights)

    def types(self) -> list[str]:
        """The types that can keep the model's heads, the most precise first."""
        return [name for name in kv_types() if self.kv.with_type(name).is_possible]

    def _option(self, other: Ledger) -> Option:
        """The option for another ledger: flags for what differs from this one."""
        flags = []
        if other.context != self.context:
            flags.append(f"--context {other.context}")
        if other.kv != self.kv:
            flags.append(f"--kv {other.kv.type}")
        if self.layout == "fast" and other.weights < self.weights:
            flags.append("--layout compact")
        if other.sessions != self.sessions:
            flags.append(f"--sessions {other.sessions}")
        return Option(" ".join(flags), other.needed)

    def _tokens(self) -> str:
        times = f"{self.sessions} x " if self.sessions > 1 else ""
        return f"{times}{self.context} tokens"
