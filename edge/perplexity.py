"""Perplexity of a model on a text, and its divergence from another model on the same text.

    with edge.load("model.gguf", context=512) as model:
        windows = cut(model, text, context=512)
        print(measure(model, windows))

The method is that of llama.cpp's `llama-perplexity` with its defaults, so that numbers compare:

- The text is tokenised once, with control tokens in it as letters, and cut into windows of
  `context` tokens that do not overlap. Tokens after the last full window are not used.
- Each window is run from an empty cache. Where the model wants a beginning-of-sequence token, it
  replaces the window's first token.
- Only the second half is scored, so that every prediction has a context: the logits of positions
  context/2 .. context-2, each for the token that follows. Of 512 tokens 255 are scored.
- Perplexity is exp(m), m the mean of -log p(token that follows); its error is exp(m) times the
  standard error of m.
- Against a base model, per scored position: KL(base || model) = sum of p_base (log p_base - log p),
  and whether both have the same most likely token. The error of the ratio of the perplexities is
  that of the paired differences, since both models meet the same hard tokens.

llama.cpp rounds the base's log-probabilities to 16 bits on their way through a file; here nothing
is rounded. The base is a model in memory beside the other one, or a file of the logits that it
gave before; and a model is in memory, or runs part by part. The numbers are the same, bit for bit.
"""

from __future__ import annotations

import math
import operator
import statistics
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge import check, native
from edge.engine.engine import Engine
from edge.engine.parts import ModelInParts
from edge.engine.states import WindowPiece
from edge.errors import (
    ContextError,
    InputError,
    MemoryBudgetError,
    ModelFileError,
    UnsupportedError,
    brief,
)
from edge.native.cancel import Cancel
from edge.progress import Progress
from edge.sizes import show
from edge.windows import MIN_CONTEXT, Windows, cut_tokens, pieces

if TYPE_CHECKING:
    from typing import TypeAlias

    from edge.files.text_file import TextFile
    from edge.model import Model

    #: Both run; a part of the second is in memory at a time.
    AnyModel: TypeAlias = Model | ModelInParts

__all__ = [
    "Divergence",
    "KeptLogits",
    "Perplexity",
    "TokenList",
    "check_vocabularies",
    "compare",
    "cut",
    "keep",
    "measure",
    "read",
]

#: Memory for each byte of a text: 8 while it is read, and 8 for a token in the windows. Half of the
#: tokens are scored: 8 for each of their numbers, and 32 where they are sorted.
_TEXT_BYTES = 40
#: Nats per token. Guessing costs log(vocabulary), about 12; e to this power is still a float.
_ABSURD = 700.0

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    perplexity: exp of the mean negative log-probability; error: its standard error; n_windows,
    n_scored: windows, and tokens predicted in them; n_tokens, seconds: the tokens that the model
    ran, and the time that this took, without scoring.
    """

    perplexity: float
    error: float
    n_windows: int
    n_scored: int
    n_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the model ran per second; 0.0 where no time was measured."""
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Divergence:
    """The divergence of a model from a base model on a text; each `_error` is a standard error.

    model, base: their perplexities; ratio: the model's perplexity by the base's. kl: the mean KL
    divergence base || model in nats; kl_median, kl_99 and kl_max: its median, 99th percentile and
    largest value over the positions. top1: the share of positions, 0 to 1, where both have the same
    most likely token.
    """

    model: Perplexity
    base: Perplexity
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    top1: float
    top1_error: float


@dataclass(frozen=True)
class KeptLogits:
    """The logits of a model on the windows of a text, which `keep` wrote to a file.

    file: float32 (n_scored, n_vocab), open for reading; path: of the model; perplexity: its own.
    """

    file: IO[bytes]
    n_vocab: int
    path: str
    windows: Windows
    perplexity: Perplexity

    def rows(self, tokens: Sequence[int], first: int) -> Iterator[Floats]:
        """The next rows of the file: logits (n_vocab,) of each position of a window from `first`
        on.
        """
        for _ in tokens[first:]:
            yield np.frombuffer(self.file.read(4 * self.n_vocab), np.float32)


class TokenList(NamedTuple):
    """The tokens of a model file. tokens: their spellings, where these are known."""

    path: str
    n_vocab: int
    tokens: Sequence[str] = ()

    @classmethod
    def of(cls, engine: Engine | ModelInParts) -> TokenList:
        """Of a model in memory."""
        tokens = engine.gguf.metadata.get("tokenizer.ggml.tokens", [])
        return cls(engine.path, engine.n_vocab, tokens)


def read(file: TextFile, models: Sequence[AnyModel], context: int, chunks: int | None) -> str:
    """A text for `cut`, or as much of it as the windows need; all models must be in memory.

    Raises InputError; MemoryBudgetError for a text that is too long for the models' budgets.
    """
    most = _most_text(models)
    wanted = None if chunks is None else models[0].tokenizer.most_bytes(chunks * context)
    if wanted is not None and (most is None or wanted <= most):
        text = file.start(wanted)
    elif (whole := file.read(most)) is not None:
        text = whole
    else:
        assert most is not None
        raise MemoryBudgetError(
            f"{file.name} has more than the {show(most)} of text that the memory budget has "
            "room for: take fewer windows (--chunks), a shorter text or a larger --memory",
            needed=most + 1,
            budget=most,
        )
    return text.removesuffix("\n") if file.ended else text  # as llama.cpp does


def cut(
    model: AnyModel,
    text: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    cancel: Cancel | None = None,
) -> Windows:
    """Tokenise a text and cut it into windows for `measure` and `compare`.

    context: tokens of a window, from 8; chunks: the most windows, None: as many as the text has.
    Only the text of these windows is encoded. cancel: see `Tokenizer.encode`.
    Raises CancelledError; InputError for a text that is too short for one window, and for numbers
    out of range; ContextError for a context that the model was not loaded for.
    """
    context = check.whole("context", context, MIN_CONTEXT)
    _check_holds(model, context)
    return cut_tokens(model.tokenizer, text, context=context, chunks=chunks, cancel=cancel)


def measure(
    model: AnyModel,
    windows: Windows,
    *,
    file: IO[bytes] | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Perplexity:
    """The model's perplexity on the windows of a text, see the top of this module.

    file: gets the logits, see `keep`. Raises ContextError when the model was loaded for less than a
    window, CancelledError, MemoryBudgetError, ModelFileError when the weights turn out to be
    damaged.
    """
    nll = array("d")
    with _runners([model], windows, progress, cancel) as (runner,):
        for token, (logits,) in _positions([runner], windows):
            nll.append(-float(native.log_softmax(logits)[token]))
            if file is not None:
                file.write(logits.tobytes())
    return _perplexity(runner, windows, nll)


def keep(
    model: AnyModel,
    windows: Windows,
    file: IO[bytes],
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> KeptLogits:
    """Measure a model and write its logits to a file, so that others compare without it in memory.

    file: empty, open for reading and writing; it gets `windows.n_scored` rows of 4 bytes for each
    token of the vocabulary. Raises OSError, and the errors of `measure`.
    """
    perplexity = measure(model, windows, file=file, progress=progress, cancel=cancel)
    engine = _engine(model)
    return KeptLogits(file, engine.n_vocab, engine.path, windows, perplexity)


def compare(
    model: AnyModel,
    base: AnyModel | KeptLogits,
    windows: Windows,
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Divergence:
    """The divergence of the model from a base model on the windows of a text.

    base: any model of the same vocabulary, such as the one that `model` was quantised from, or the
    logits that it gave on these windows. Raises InputError when the vocabularies or the windows
    differ, and the errors of `measure`.
    """
    _check_base(model, base, windows)
    kept = [base] if isinstance(base, KeptLogits) else []
    models = [model] if isinstance(base, KeptLogits) else [model, base]
    nll, nll_base, kl, same = array("d"), array("d"), array("d"), array("b")
    with _runners(models, windows, progress, cancel) as runners:
        for token, (logits, logits_base) in _positions([*runners, *kept], windows):
            log_q, log_p = native.log_softmax(logits), native.log_softmax(logits_base)
            nll.append(-float(log_q[token]))
            nll_base.append(-float(log_p[token]))
            kl.append(_kl(native.softmax(logits_base), log_p, log_q))
            same.append(bool(logits.argmax() == logits_base.argmax()))
    measured = _perplexity(runners[0], windows, nll)
    measured_base = kept[0].perplexity if kept else _perplexity(runners[1], windows, nll_base)
    if not all(map(math.isfinite, kl)):
        raise _damaged(runners[0])
    log_ratio = _Mean.of(array("d", map(operator.sub, nll, nll_base)))
    ratio = math.exp(log_ratio.value)
    mean_kl, top1 = _Mean.of(kl), _Mean.of(same)
    return Divergence(
        model=measured,
        base=measured_base,
        ratio=ratio,
        ratio_error=ratio * log_ratio.error,
        kl=mean_kl.value,
        kl_error=mean_kl.error,
        kl_median=statistics.median(kl),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=max(kl),
        top1=top1.value,
        top1_error=top1.error,
    )


# ---- running ----


class _ModelRun:
    """Runs one model on one window after the other. count(n_tokens): called after each run."""

    def __init__(
        self, engine: Engine, cache: Any, count: Callable[[int], None], cancel: Cancel | None
    ) -> None:
        self.engine = engine
        self.seconds, self.n_tokens = 0.0, 0
        self._cache, self._count, self._cancel = cache, count, cancel

    def rows(self, tokens: Sequence[int], first: int) -> Iterator[Floats]:
        """Logits (n_vocab,) of each position from `first` on, ROWS of them computed at a time."""
        self._cache.trim(0)
        for piece in pieces(tokens, first):
            # Copies: a view in use would keep all of these rows in memory beside the next ones.
            yield from map(np.copy, self._run(piece))

    def _run(self, piece: WindowPiece) -> Floats | tuple[()]:
        """Logits (tokens, n_vocab) where they are scored, else ()."""
        start = perf_counter()
        logits = self.engine.run(
            self._cache,
            piece.tokens,
            logits="all" if piece.is_scored else "none",
            cancel=self._cancel,
        )
        self.seconds += perf_counter() - start
        self.n_tokens += len(piece.tokens)
        self._count(len(piece.tokens))
        return () if logits is None else logits


class _PartsRun:
    """Runs a model part by part on all windows, and gives their logits one after the other."""

    def __init__(
        self,
        model: ModelInParts,
        windows: Windows,
        count: Callable[[int], None],
        cancel: Cancel | None,
    ) -> None:
        self.engine = model
        self.seconds, self.n_tokens = 0.0, 0
        cut_windows = [list(pieces(window[:-1], windows.first)) for window in windows.tokens]
        self._logits = model.run(cut_windows, count, cancel)

    def rows(self, tokens: Sequence[int], first: int) -> Iterator[Floats]:
        """Logits (n_vocab,) of each position of the next window from `first` on."""
        for piece in pieces(tokens, first):
            start = perf_counter()
            logits = next(self._logits)
            self.seconds += perf_counter() - start
            self.n_tokens += len(piece.tokens)
            yield from () if logits is None else map(np.copy, logits)

    def close(self) -> None:
        """End the run."""
        self._logits.close()


@contextmanager
def _runners(
    models: Sequence[AnyModel], windows: Windows, progress: Progress | None, cancel: Cancel | None
) -> Iterator[list[_ModelRun | _PartsRun]]:
    """A runner for each model; progress counts the tokens of all, once for each part of a model."""
    if not isinstance(windows, Windows):
        raise InputError(f"windows is {brief(windows)}, it must be what `cut` gives")
    check.optional(check.function, "progress", progress, "(done, total)")
    times = sum(m.n_parts if isinstance(m, ModelInParts) else 1 for m in models)
    total = times * len(windows.tokens) * (windows.context - 1)
    done = 0

    def count(n_tokens: int) -> None:
        nonlocal done
        done += n_tokens
        if progress is not None:
            progress(done, total)

    with ExitStack() as stack:
        runners: list[_ModelRun | _PartsRun] = []
        for model in models:
            _check_holds(model, windows.context)
            engine = _engine(model)
            if isinstance(engine, ModelInParts):
                runners.append(
                    stack.enter_context(closing(_PartsRun(engine, windows, count, cancel)))
                )
                continue
            cache = engine.cache()
            stack.callback(cache.close)
            runners.append(_ModelRun(engine, cache, count, cancel))
        count(0)
        yield runners


def _positions(
    sources: Sequence[_ModelRun | _PartsRun | KeptLogits], windows: Windows
) -> Iterator[tuple[int, tuple[Floats, ...]]]:
    """(the token that follows, logits (n_vocab,) of each model) for each scored position."""
    first = windows.first
    for window in windows.tokens:
        # The last token of a window is not run: it would predict a token outside the window.
        rows = (source.rows(window[:-1], first) for source in sources)
        yield from zip(window[first + 1 :], zip(*rows, strict=True), strict=True)


# ---- numbers ----


class _Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Mean:
        """Of two or more values, exactly summed."""
        n = len(values)
        mean = math.fsum(values) / n
        variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
        return cls(mean, math.sqrt(variance / n))


def _kl(p: Floats, log_p: Floats, log_q: Floats) -> float:
    """Sum of p (log p - log q) in float64, in order: the same bits on every machine."""
    with np.errstate(invalid="ignore"):  # infinite only with damaged weights: the caller raises
        terms = p.astype(np.float64) * (log_p.astype(np.float64) - log_q)
    return float(np.cumsum(terms)[-1])


def _perplexity(
    runner: _ModelRun | _PartsRun, windows: Windows, nll: Sequence[float]
) -> Perplexity:
    """The perplexity of these negative log-probabilities. Raises ModelFileError where they are not
    finite, or absurd.
    """
    if not all(map(math.isfinite, nll)):
        raise _damaged(runner)
    mean = _Mean.of(nll)
    if mean.value > _ABSURD:
        raise _damaged(runner)
    perplexity = math.exp(mean.value)
    return Perplexity(
        perplexity=perplexity,
        error=perplexity * mean.error,
        n_windows=len(windows.tokens),
        n_scored=len(nll),
        n_tokens=runner.n_tokens,
        seconds=runner.seconds,
    )


def _damaged(runner: _ModelRun | _PartsRun) -> ModelFileError:
    return ModelFileError(
        "what the text says comes out as impossible: the weights are damaged",
        path=runner.engine.path,
    )


# ---- checks ----


def _engine(model: AnyModel) -> Engine | ModelInParts:
    """The native engine of a model. Raises UnsupportedError for another engine, because its weights
    are not known.
    """
    if isinstance(model, ModelInParts):
        return model
    if not isinstance(model.engine, Engine):
        raise UnsupportedError(
            f"{model.engine.path}: perplexity is measured of GGUF models", what="perplexity"
        )
    return model.engine


def _check_holds(model: AnyModel, context: int) -> None:
    engine = model if isinstance(model, ModelInParts) else model.engine
    limit = engine.config.n_context
    if context > limit:
        raise ContextError(
            f"{engine.path}: windows of {context} tokens, it was loaded for {limit}",
            needed=context,
            limit=limit,
        )


def _most_text(models: Sequence[AnyModel]) -> int | None:
    """The most bytes of text for which the models' memory budgets have room, with the tokens and
    numbers of the text; None: any number.
    """
    room = []
    for ledger in (_engine(model).ledger for model in models):
        if ledger.budget is not None:
            room.append(ledger.budget - ledger.needed + ledger.parts["prompt"])
    return min(room) // _TEXT_BYTES if room else None


def _check_base(model: AnyModel, base: AnyModel | KeptLogits, windows: Windows) -> None:
    """Raise InputError for a base that the model cannot be compared with on these windows."""
    engine = _engine(model)
    if not isinstance(base, KeptLogits):
        check_vocabularies(TokenList.of(engine), TokenList.of(_engine(base)))
        return
    if base.windows != windows:
        raise InputError(f"the logits of {base.path} are of other windows")
    check_vocabularies(TokenList(engine.path, engine.n_vocab), TokenList(base.path, base.n_vocab))
    base.file.seek(0)


def check_vocabularies(model: TokenList, base: TokenList) -> None:
    """Raise InputError unless every token has the same spelling in both."""
    ours, theirs = model.tokens, base.tokens
    if ours == theirs and model.n_vocab == base.n_vocab:
        return
    where = f"{model.path} and {base.path} differ in their vocabularies"
    if model.n_vocab != base.n_vocab:
        raise InputError(f"{where}: {model.n_vocab} and {base.n_vocab} tokens")
    i = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1), 0)
    spelled = " and ".join(brief(tokens[i] if tokens else None) for tokens in (ours, theirs))
    raise InputError(f"{where}: token {i} is {spelled}")
