"""The contracts between the layers: the methods of an engine that sessions and models call, and the
methods of a loaded model that sessions call. There are two engines, the native one and
onnxruntime's.

An engine is made in two steps. A `Described` is an open model that shows what it is and how much
memory it would take. Its `start` makes the engine (`Backend`), which takes memory and time.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

    from edge.kv.shape import WhenFull
    from edge.native.cancel import Cancel
    from edge.progress import Progress
    from edge.template.template import ChatTemplate
    from edge.tokenizer import Tokenizer

__all__ = ["Backend", "BackendConfig", "Cache", "Described", "Loaded", "MemoryPlan"]

#: The type of a loaded model's sessions, which are defined in a layer above this one.
SessionT = TypeVar("SessionT", covariant=True)


class BackendConfig(Protocol):
    """Numbers of a model."""

    @property
    def n_context(self) -> int:
        """Positions that a session may use."""


class Cache(Protocol):
    """Keys and values of one session's tokens, see `edge.kv.cache.KVCache`.

    n_groups: layer groups, each of which has its own pages. Page i of group g has the number
    i * n_groups + g.
    """

    tokens: array[int]
    limit: int
    when_full: WhenFull
    n_groups: int

    @property
    def length(self) -> int:
        """How many tokens it holds."""

    @property
    def n_pages(self) -> int:
        """How many pages its tokens take."""

    def has_page(self, number: int) -> bool:
        """Whether a page is in memory."""

    def page(self, number: int) -> memoryview:
        """The bytes of a page, to be read before the cache is used again. Raises InputError."""

    def unseen(self, length: int) -> Sequence[range]:
        """Of each group, numbers of the pages that no token behind the first `length` sees."""

    def holds(self, length: int) -> bool:
        """Whether `trim` to this length keeps it all."""

    def room(self, n_tokens: int) -> int:
        """How many of n_tokens tokens the next run may take."""

    def adopt(self, tokens: Sequence[int]) -> int:
        """Take over keys and values of these tokens that are computed already; the new length."""

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens, or fewer. Raises InputError."""

    def fork(self) -> Cache:
        """Another cache with the same content. Raises MemoryBudgetError."""

    def keep(self, n_tokens: int) -> int:
        """Write the keys and values of the first n_tokens tokens for later runs; returns of how
        many. Raises InputError.
        """

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with the tokens and pages of another. Raises InputError,
        MemoryBudgetError, ContextError.
        """

    def close(self) -> None:
        """Give the memory back."""


class Backend(Protocol):
    """A loaded model that runs tokens; any number of threads may call it.

    chunk: the most tokens of one run; n_vocab: logits of a row; isa: the instruction set or device,
    for people.
    """

    chunk: int
    n_vocab: int
    isa: str

    @property
    def recommended(self) -> Mapping[str, Any]:
        """What the model's files say of sampling, see `edge.session.recommended`."""

    @property
    def notes(self) -> Sequence[str]:
        """A line for each thing in the files that may lead to results that nobody meant."""

    @property
    def path(self) -> str:
        """The path of the model."""

    @property
    def config(self) -> BackendConfig:
        """Numbers of the model."""

    @property
    def threads(self) -> int:
        """How many threads it runs on."""

    @property
    def refused(self) -> str | None:
        """Why the system did not restrict the threads to their CPUs; None: it did."""

    @property
    def keeps_prompts(self) -> bool:
        """Whether caches can `keep` their keys and values for later runs."""

    @property
    def page_bytes(self) -> Sequence[int]:
        """Bytes of a page of keys and values, of each layer group."""

    def cache(self, when_full: WhenFull = "stop") -> Cache:
        """A new, empty cache. Raises InputError, UnsupportedError."""

    def run(
        self,
        cache: Any,
        tokens: Sequence[int],
        *,
        logits: Literal["none", "last", "all"] = "last",
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32] | None:
        """Run tokens that follow those in the cache, see `edge.engine.engine.Engine.run`."""

    def facts(self) -> dict[str, Any]:
        """The facts that a saved session depends on, plain values for JSON: see
        `edge.session.restore`.
        """

    def info(self) -> dict[str, Any]:
        """Facts for people and programs, plain values for JSON."""

    def close(self) -> None:
        """Give everything back, after the current run. Later runs raise InputError."""


class Loaded(Protocol[SessionT]):
    """A loaded model as its sessions know it, see `edge.model.Model`.

    closed: whether it was closed; the properties, and `session`, then raise InputError.
    """

    closed: bool

    @property
    def engine(self) -> Backend:
        """The engine that runs it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises ModelFileError, UnsupportedError."""

    @property
    def template(self) -> ChatTemplate:
        """Its chat template. Raises TemplateError where it has none, ModelFileError."""

    def session(self, when_full: WhenFull = "stop") -> SessionT:
        """A new, empty session, which is closed with the model."""


class MemoryPlan(Protocol):
    """The memory that a model will take, in bytes."""

    @property
    def parts(self) -> Mapping[str, int]:
        """The bytes of each part, by name."""

    @property
    def needed(self) -> int:
        """The bytes of all parts."""

    @property
    def budget(self) -> int | None:
        """The bytes that the whole process may have; None: the system does not say."""

    @property
    def is_stated(self) -> bool:
        """Whether the caller stated the budget."""

    @property
    def fits(self) -> bool:
        """Whether `needed` is within the budget."""

    def require(self) -> None:
        """Raise MemoryBudgetError unless it fits."""


class Described(Protocol):
    """An open model with its header, graph and ledger; no weights are read yet.

    Close it, or use it in a `with`: that closes its files, unless an engine owns them by then. Its
    files are also closed when it is freed.
    """

    @property
    def path(self) -> str:
        """The path of the model."""

    @property
    def ledger(self) -> MemoryPlan:
        """The memory that it would take."""

    def new_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built anew. Raises ModelFileError, UnsupportedError."""

    def new_template(self) -> ChatTemplate:
        """Its chat template. Raises TemplateError where it has none, ModelFileError."""

    def start(self, progress: Progress | None = None) -> Backend:
        """Make the engine, once. progress(bytes done, bytes in all).

        Raises MemoryBudgetError, ModelFileError, UnsupportedError, InputError.
        """

    def close(self) -> None:
        """Close the files, unless an engine owns them."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
