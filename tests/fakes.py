"""A toy engine, tokenizer and template: what sessions do, without a native library.

The toy model's logits depend on every token in its cache, so that a cache that does not hold what
the session believes gives another answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge.errors import CancelledError, ContextError, InputError
from edge.model import Model
from edge.session.chat import Chat
from edge.session.session import Session

SPECIALS = ("<s>", "<end>", "<user>", "<bot>")  # ids 256, 257 (ends a turn), 258, 259
N_VOCAB = 256 + len(SPECIALS)
BOS, END = 256, 257
GUARD = "\ufdd0"


def ids(text: str) -> list[int]:
    """One token per byte, as FakeTokenizer's."""
    return list(text.encode())


class FakeDecoder:
    """Whole characters from bytes."""

    def __init__(self) -> None:
        self._bytes = b""

    def push(self, token: int) -> str:
        self._bytes += bytes([token]) if token < 256 else b""
        try:
            text, self._bytes = self._bytes.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text

    @property
    def is_unfinished(self) -> bool:
        return self._bytes != b""

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode(errors="replace"), b""
        return text


class FakeTokenizer:
    """Bytes and four control tokens."""

    n_vocab = N_VOCAB
    bos_id = BOS
    eos_ids = frozenset({END})
    notes = ()

    def __init__(self, add_bos: bool = True) -> None:
        self.add_bos = add_bos

    def encode(
        self,
        text: str,
        *,
        special: bool = False,
        bos: bool | None = None,
        room: int | None = None,
        cancel: Any = None,
    ) -> list[int]:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise InputError("a lone surrogate")
        out = [BOS] if (self.add_bos if bos is None else bos) else []
        if special and text.startswith(SPECIALS[0]):
            out = []
        while text:
            found = next((s for s in SPECIALS if special and text.startswith(s)), None)
            out += [256 + SPECIALS.index(found)] if found else ids(text[0].replace(GUARD, ""))
            text = text[len(found or "x") :]
        return out

    def most_bytes(self, n_tokens: int) -> int:
        return n_tokens

    def quote(self, text: str) -> str:
        for special in SPECIALS:
            text = text.replace(special, special[0] + GUARD + special[1:])
        return text

    def is_special(self, token: int) -> bool:
        return token >= 256

    def token_text(self, token: int) -> str:
        return SPECIALS[token - 256] if token >= 256 else chr(token)

    def decoder(self, *, after: int | None = None) -> FakeDecoder:
        return FakeDecoder()


class FakeTemplate:
    """<user>question<end><bot>answer<end>...<bot>, tools before <bot>"""

    takes_tools = True

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        variables: Any = None,
        cancel: Any = None,
    ) -> str:
        self.seen, self.variables = (messages, tools), variables
        turns = (f"<{m['role']}>{m['content'].strip()}<end>" for m in messages)
        text = "".join(turns).replace("<assistant>", "<bot>")
        text += str(tools) if tools and self.takes_tools else ""
        return text + "<bot>" * add_generation_prompt


@dataclass
class FakeCache:
    """The tokens themselves; `shared` are those that other caches have computed."""

    limit: int
    when_full: str = "stop"
    shared: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    closed: bool = False
    n_groups: int = 1

    @property
    def length(self) -> int:
        return len(self.tokens)

    def trim(self, length: int) -> None:
        assert 0 <= length <= self.length
        del self.tokens[length:]

    def holds(self, length: int) -> bool:
        return True

    def room(self, n_tokens: int) -> int:
        return n_tokens

    def adopt(self, tokens: Sequence[int]) -> int:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, self.shared, strict=False))
        self.tokens += tokens[self.length : len(list(same))]
        return self.length

    def fork(self) -> FakeCache:
        return replace(self, tokens=list(self.tokens))

    def keep(self, n_tokens: int) -> int:
        self.kept = self.tokens[:n_tokens]
        return len(self.kept)

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """answer(tokens) -> the token that gets the largest logit, None: chance.

    runs: the tokens of each native call. on_run: called within each, as another thread would act.
    """

    n_vocab, threads, isa, packed_bytes, arena_bytes, chunk = N_VOCAB, 1, "toy", 10, 20, 4
    page_bytes, recommended, notes = (64,), dict[str, Any](), ()

    def __init__(
        self, answer: Callable[[list[int]], int | None] = lambda tokens: None, context: int = 64
    ) -> None:
        self.answer = answer
        self.config = SimpleNamespace(
            architecture="toy", n_context=context, n_context_train=99, n_layers=1
        )
        tensor = SimpleNamespace(type="F32", shape=(3, 5))
        self.gguf = SimpleNamespace(
            path="toy.gguf", metadata={"general.name": "toy"}, tensors={"x": tensor}, n_bytes=30
        )
        self.path, self.layouts = "toy.gguf", {"x": "f32"}
        self.keeps_prompts = False
        self.shared: list[int] = []
        self.runs: list[list[int]] = []
        self.on_run: Callable[[], None] = lambda: None
        self.seconds = 0.0
        self.closed = False

    def cache(self, when_full: str = "stop") -> FakeCache:
        limit = self.config.n_context if when_full == "stop" else self.config.n_context_train
        return FakeCache(limit, when_full, self.shared)

    def cache_bytes(self, n_tokens: int) -> int:
        return n_tokens

    def close(self) -> None:
        self.closed = True

    def run(
        self, cache: FakeCache, tokens: Sequence[int], *, logits: str = "last", cancel: Any = None
    ) -> np.ndarray | None:
        assert 1 <= len(tokens) <= self.chunk
        if cache.length + len(tokens) > cache.limit:
            raise ContextError("full", needed=cache.length + len(tokens), limit=0)
        time.sleep(self.seconds)
        self.on_run()
        if cancel is not None and cancel.is_set():
            raise CancelledError("cancelled")
        cache.tokens += tokens
        self.runs.append(list(tokens))
        return self.logits(cache.tokens) if logits != "none" else None

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Random logits, the same for the same tokens; (1, n_vocab)."""
        out = np.random.default_rng(tokens).standard_normal((1, N_VOCAB)).astype(np.float32)
        out[0, 128:] -= 20  # so that chance speaks ASCII and does not end
        best = self.answer(tokens)
        if best is not None:
            out[0, best] = 50
        return out


def says(*answers: str) -> Callable[[list[int]], int | None]:
    """The i-th answer after the i-th <bot> (or the first from the start), then the end token."""

    def answer(tokens: list[int]) -> int | None:
        bots = [i for i, token in enumerate(tokens) if token == 259]
        said = answers[max(len(bots) - 1, 0)]
        text = FakeTokenizer().encode(said, special=True, bos=False)
        made = len(tokens) - (bots[-1] + 1 if bots else PROMPT)
        return text[made] if made < len(text) else END

    return answer


PROMPT = 3  # tokens of a plain prompt that `says` expects: <s> and two letters


def fake_model(
    answer: Callable[[list[int]], int | None] = lambda tokens: None, context: int = 64
) -> tuple[Model, FakeEngine]:
    """A model on a toy engine."""
    engine = FakeEngine(answer, context)
    model = Model(engine)
    model._tokenizer, model._template = FakeTokenizer(), FakeTemplate()
    return model, engine


def cancel_at(engine: FakeEngine, session: Session | Chat, n_run: int) -> None:
    """Cancel within the n-th native call from now, as another thread would."""
    calls = iter(range(n_run))
    engine.on_run = lambda: session.cancel() if next(calls, None) == n_run - 1 else None
