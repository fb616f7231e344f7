"""The second moments of what matrices read: X.T X over the tokens of a text, for error feedback.

    for names in passes(activations, weights, most_bytes=activations.room):
        moments = collect(activations, windows, names)
        for name in names:
            for rows in moments[name]: ...

Rows of a weight that make the values of attention have moments of their own for each key head, see
`edge.quantizer.mixing`; of a stack of experts each has its own. All other rows share those of the
value that the weight reads, and weights that read the same value share them, too.

- Every eighth window is held back: it makes `Moments.held`, by which rounding is judged.
- A token that is LONGEST times as long as the median of its window counts as if it were that long:
  the first tokens of a window can be a thousand times as long. Inputs that attention mixes are not
  cut, since what these tokens do to all others is what is measured there.
- From TOKENS_PER_COLUMN tokens for each input column on, moments say more than their diagonal. More
  than ENOUGH_PER_COLUMN gain little: of a long text every second, third, ... group of eight windows
  is taken for narrow inputs. What attention mixes counts once for each query head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from edge.errors import InputError, ModelFileError
from edge.native.cancel import Cancel
from edge.progress import Progress
from edge.quantizer.activations import Activations, Site
from edge.quantizer.mixing import ValueRows, mixing, value_rows
from edge.windows import Windows

__all__ = ["Moments", "RowMoments", "collect", "passes", "wanted_tokens"]

Floats = NDArray[np.float32]

#: Of so many windows one, the last, is held back.
HELD_EVERY = 8
#: The fewest tokens for each input column, and how many are enough.
TOKENS_PER_COLUMN, ENOUGH_PER_COLUMN = 16, 64
#: Rows of moments that a task adds to, and inputs that are added at a time: with fewer of them, the
#: moments are read and written more often than it takes to multiply.
_SLICE, _BATCH = 512, 2048
#: Matrices (tokens, tokens) that mixing needs at a time.
_SQUARES = 8
#: How much longer than the median of a window a token counts at most.
LONGEST = 100.0


@dataclass
class Moments:
    """Sums of x.T x, (k, k) float32, symmetric. train, held: of the windows for rounding, and of
    those held back; n_train, n_held: how many x there were: tokens, or, where attention mixes
    them, tokens of each query head. An expert that no token reached has zeros of none.
    """

    train: Floats
    held: Floats
    n_train: int = 0
    n_held: int = 0


@dataclass(frozen=True)
class RowMoments:
    """Rows of a weight that share moments. first: the first row, counted over all experts of a
    stack; n_rows: how many.
    """

    first: int
    n_rows: int
    moments: Moments


def passes(
    activations: Activations, names: Sequence[str], most_bytes: int | None
) -> list[list[str]]:
    """Group weights, in the order in which they are used, such that the moments of each group, and
    what `collect` needs beside, take at most so many bytes; None: any number. A weight that no
    product reads, such as a table of embeddings alone, is in no group, nor is one whose moments
    alone take more.
    """
    sources, groups = _Sources(activations), [list[str]()]
    for name in sources.in_order(names):
        if most_bytes is None or sources.n_bytes([*groups[-1], name]) <= most_bytes:
            groups[-1].append(name)
        elif sources.n_bytes([name]) <= most_bytes:
            groups.append([name])
    return [group for group in groups if group]


def wanted_tokens(activations: Activations, names: Sequence[str]) -> int:
    """How many tokens of text the moments of these weights want, for the widest of their inputs."""
    return TOKENS_PER_COLUMN * max(activations.graph.weights[name][-1] for name in names)


def collect(
    activations: Activations,
    windows: Windows,
    names: Sequence[str],
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, list[RowMoments]]:
    """The moments of a group of weights, by name; the rows of each weight in order.

    progress(tokens done, tokens in all). Raises InputError for a text that is too short even for
    the narrowest of the inputs, see `wanted_tokens`, ModelFileError for inputs that are not finite,
    MemoryBudgetError, CancelledError, and what `Engine.run` raises.
    """
    _require_tokens(activations, windows, names)
    sources = _Sources(activations)
    activations.require(sources.n_bytes(names), "second moments")
    sums = {source: _Sum(source.k) for name in names for source in sources.of(name)}
    steps = {source: source.step(len(windows.tokens) * windows.context) for source in sums}
    total = len(windows.tokens) * windows.context
    n_threads = activations.engine.threads
    # numpy's own threads beside those of the pool would wait for each other
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(n_threads) as pool:
        for i, window in enumerate(windows.tokens):
            if progress is not None:
                progress(i * windows.context, total)
            is_held = i % HELD_EVERY == HELD_EVERY - 1
            group = i // HELD_EVERY
            taken = {source: sum_ for source, sum_ in sums.items() if group % steps[source] == 0}
            if not taken:
                continue
            tasks = _read(activations, window, taken, is_held=is_held, cancel=cancel)
            _run_all(pool, tasks)
        _run_all(pool, (task for sum_ in sums.values() for task in sum_.rest()))
    if progress is not None:
        progress(total, total)
    moments = {source: sum_.whole() for source, sum_ in sums.items()}
    for source, own in moments.items():
        if not (np.isfinite(own.train).all() and np.isfinite(own.held).all()):
            raise ModelFileError(
                f"what {source.site.weights[0]} reads is NaN or infinite: the weights are damaged",
                path=activations.engine.path,
            )
    return {
        name: [RowMoments(first, n, moments[source]) for first, n, source in sources.rows(name)]
        for name in names
    }


def _run_all(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], None]]) -> None:
    for _ in pool.map(lambda task: task(), tasks):
        pass


def _require_tokens(activations: Activations, windows: Windows, names: Sequence[str]) -> None:
    """Raise InputError for a text that is too short for all of the weights."""
    n = len(windows.tokens) * windows.context
    least = TOKENS_PER_COLUMN * min(activations.graph.weights[name][-1] for name in names)
    if n < least or len(windows.tokens) < HELD_EVERY:
        raise InputError(
            f"the text has {n} tokens in {len(windows.tokens)} windows: second moments want "
            f"{least} at least, {wanted_tokens(activations, names)} for the widest matrix, in "
            f"{HELD_EVERY} windows or more: take a longer text"
        )


@dataclass(frozen=True)
class _Source:
    """What moments are of: the inputs of an expert, or of 0; or those of the values of a key head,
    as attention mixes them.
    """

    site: Site
    expert: int = 0
    values: ValueRows | None = None

    @property
    def k(self) -> int:
        """Elements of an input."""
        return self.site.k

    @property
    def n_heads(self) -> int:
        """Query heads that mix the inputs; 1: none does."""
        heads = None if self.values is None else self.values.attention.heads
        return 1 if heads is None else heads.n_heads // heads.n_kv_heads

    def step(self, n_tokens: int) -> int:
        """Of how many groups of windows one is enough. An expert gets its share of the tokens."""
        n = n_tokens * self.n_heads * self.site.n_used // self.site.n_experts
        return max(1, n // (ENOUGH_PER_COLUMN * self.k))


class _Sources:
    """Which moments the rows of each weight have."""

    def __init__(self, activations: Activations) -> None:
        self._weights = activations.graph.weights
        self._threads, self._context = activations.engine.threads, activations.context
        self._site = {name: site for site in activations.sites for name in site.weights}
        self._order = {name: i for i, name in enumerate(self._site)}
        self._values: dict[str, list[ValueRows]] = {}
        for rows in value_rows(activations.graph):
            self._values.setdefault(rows.weight, []).append(rows)

    def in_order(self, names: Sequence[str]) -> list[str]:
        """The weights that products read, in the order of use."""
        return sorted(filter(self._order.__contains__, names), key=self._order.__getitem__)

    def rows(self, name: str) -> list[tuple[int, int, _Source]]:
        """(first row, how many, what their moments are of), of all rows of a weight."""
        site, shape = self._site[name], self._weights[name]
        if site.kept.routes is not None:
            n = shape[1]
            return [(i * n, n, _Source(site, i)) for i in range(site.n_experts)]
        found, end = list[tuple[int, int, _Source]](), 0
        for values in self._values.get(name, []):
            if values.first > end:
                found.append((end, values.first - end, _Source(site)))
            found.append((values.first, values.n, _Source(site, 0, values)))
            end = values.first + values.n
        n = int(np.prod(shape[:-1]))
        return [*found, (end, n - end, _Source(site))] if n > end else found

    def of(self, name: str) -> list[_Source]:
        """What the moments of a weight are of."""
        return list(dict.fromkeys(source for _, _, source in self.rows(name)))

    def n_bytes(self, names: Sequence[str]) -> int:
        """Bytes of the moments of some weights, and of what collecting them needs beside."""
        sources = {source for name in names for source in self.of(name)}
        sites = {source.site for source in sources}
        attentions = {s.values.attention for s in sources if s.values is not None}
        heads = [(op.heads.n_heads + 2 * op.heads.n_kv_heads) * op.heads.head_dim
                 for op in attentions]  # fmt: skip
        # in parts, joined, and cut where tokens are long; those of both sums wait for a whole batch
        rows = 3 * self._context * (sum(site.k * site.n_used for site in sites) + sum(heads))
        rows += 2 * (_BATCH + self._context) * sum(source.k for source in sources)
        widest = max(site.k for site in sites)
        scratch = self._threads * (_SLICE * widest + _SQUARES * self._context**2)
        return 4 * (2 * sum(source.k**2 for source in sources) + rows + scratch)


def _read(
    activations: Activations,
    window: Sequence[int],
    sums: dict[_Source, _Sum],
    *,
    is_held: bool,
    cancel: Cancel | None,
) -> Iterator[Callable[[], None]]:
    """Run a window. Returns the tasks that add to the sums what it read."""
    sites = list(dict.fromkeys(source.site for source in sums))
    values = [source.values for source in sums if source.values is not None]
    attentions = list(dict.fromkeys(rows.attention for rows in values))
    names = [*(site.weights[0] for site in sites), *(op.output for op in attentions)]
    read: dict[tuple[Site, int], list[Floats]] = {}
    queries: dict[str, list[Floats]] = {}
    for n in activations.run(window, names, cancel=cancel):
        for site in sites:
            for expert, x in activations.inputs(site, n):
                read.setdefault((site, expert), []).append(x)
        for op in attentions:
            queries.setdefault(op.output, []).append(activations.queries(op.output, n))
    inputs = {key: np.concatenate(read.pop(key)) for key in list(read)}
    heads = {name: np.concatenate(queries.pop(name)) for name in list(queries)}
    capped = {
        (source.site, source.expert): _capped(inputs[source.site, source.expert])
        for source in sums
        if source.values is None and (source.site, source.expert) in inputs
    }
    # those of values take longest
    for source in sorted(sums, key=lambda source: source.values is None):
        key, total = (source.site, source.expert), sums[source]
        if source.values is not None:
            op, head = source.values.attention, source.values.head
            sinks = activations.vector(op.weights[0]) if op.weights else None
            mixed = partial(mixing, op, heads[op.output], sinks, head)
            n = len(inputs[key]) * source.n_heads
            yield partial(total.add_mixed, inputs[key], mixed, n, is_held)
        elif key in capped:
            yield from total.tasks(capped[key], is_held)


def _capped(x: Floats) -> Floats:
    """The rows, none longer than LONGEST times their median."""
    lengths = np.sqrt(np.einsum("ij,ij->i", x, x))
    most = np.float32(LONGEST) * np.median(lengths)
    long = lengths > most
    if long.any():
        x = x.copy()
        x[long] *= (most / lengths[long])[:, None]
    return x


class _Sum:
    """Moments under way; only blocks on and right of the diagonal are added to."""

    def __init__(self, k: int) -> None:
        self._moments = Moments(np.zeros((k, k), np.float32), np.zeros((k, k), np.float32))
        self._waiting: dict[bool, list[Floats]] = {False: [], True: []}  # is_held -> inputs

    def tasks(self, x: Floats, is_held: bool) -> Iterator[Callable[[], None]]:
        """Tasks that add x.T x, for any threads, once there are enough inputs."""
        waiting = self._waiting[is_held]
        waiting.append(x)
        if sum(map(len, waiting)) >= _BATCH:
            yield from self._add_waiting(is_held)

    def rest(self) -> Iterator[Callable[[], None]]:
        """Tasks that add what is left, for any threads."""
        for is_held, waiting in self._waiting.items():
            if waiting:
                yield from self._add_waiting(is_held)

    def _add_waiting(self, is_held: bool) -> Iterator[Callable[[], None]]:
        x = np.concatenate(self._waiting[is_held])
        self._waiting[is_held].clear()
        total = self._count(len(x), is_held)
        for first in range(0, len(total), _SLICE):
            yield partial(_add_rows, total, first, x, x)

    def add_mixed(self, x: Floats, mixed: Callable[[], Floats], n: int, is_held: bool) -> None:
        """Add x.T mixed() x, of n rows."""
        total, y = self._count(n, is_held), mixed() @ x
        for first in range(0, len(total), _SLICE):
            _add_rows(total, first, x, y)

    def whole(self) -> Moments:
        """The moments, symmetric, when all is added."""
        for total in (self._moments.train, self._moments.held):
            for first in range(0, len(total), _SLICE):
                end = first + _SLICE
                total[end:, first:end] = total[first:end, end:].T
                block = total[first:end, first:end]
                block[:] = (block + block.T) / 2  # products of threads are only nearly symmetric
        return self._moments

    def _count(self, n: int, is_held: bool) -> Floats:
        if is_held:
            self._moments.n_held += n
            return self._moments.held
        self._moments.n_train += n
        return self._moments.train


def _add_rows(total: Floats, first: int, x: Floats, y: Floats) -> None:
    """Add to some rows of the total, from the diagonal on, those of x.T y."""
    rows = slice(first, first + _SLICE)
    total[rows, first:] += x[:, rows].T @ y[:, first:]
