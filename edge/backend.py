"""What sessions and models need of an engine, the native one or onnxruntime's; and what sessions
need of a loaded model.

An engine comes in two steps: what is open and described (`Described`) shows what it is and what it
would take; `start` makes the engine (`Backend`) of it, which takes memory and time.
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

#: The type of a loaded model's sessions, which are built on what is here.
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
        """Pages that its tokens take."""

    def has_page(self, number: int) -> bool:
        """Whether a page is in memory."""

    def page(self, number: int) -> memoryview:
        """The bytes of a page, to be read before the cache is used again. Raises InputError."""

    def unseen(self, length: int) -> Sequence[range]:
        """Of each group, numbers of the pages that no token behind the first `length` sees."""

    def holds(self, length: int) -> bool:
        """Whether `trim` to this length keeps it all."""

    def room(self, n_tokens: int) -> int:
        """How many of n_tokens the next run may take."""

    def adopt(self, tokens: Sequence[int]) -> int:
        """Take over what others have computed of these tokens; the new length."""

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens, or fewer. Raises InputError."""

    def fork(self) -> Cache:
        """Another cache with the same content. Raises MemoryBudgetError."""

    def keep(self, n_tokens: int) -> int:
        """Write what it has of the first n_tokens for later runs; of how many. InputError."""

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with another's tokens and pages. Raises InputError,
        MemoryBudgetError, ContextError.
        """

    def close(self) -> None:
        """Give the memory back."""


class Backend(Protocol):
    """A loaded model that runs tokens; any number of threads may call it.

    chunk: most tokens of one run; n_vocab: logits of a row; isa, threads: what it runs on, for
    people; refused: why the system did not keep the threads where they should be, None: it did.
    """

    chunk: int
    n_vocab: int
    isa: str

    @property
    def path(self) -> str:
        """Where the model lies."""

    @property
    def config(self) -> BackendConfig:
        """Numbers of the model."""

    @property
    def threads(self) -> int:
        """How many it runs on."""

    @property
    def refused(self) -> str | None:
        """See above."""

    @property
    def keeps_prompts(self) -> bool:
        """Whether caches can `keep` what they hold for later runs."""

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
        """Run tokens behind those in the cache, see `edge.engine.engine.Engine.run`."""

    def facts(self) -> dict[str, Any]:
        """What a session depends on, plain values for JSON: see `edge.session.restore`."""

    def info(self) -> dict[str, Any]:
        """Facts for people and programs, plain values for JSON."""

    def close(self) -> None:
        """Give everything back. A run under way ends first; runs after it raise InputError."""


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
    """What a model will take of the memory, in bytes."""

    @property
    def parts(self) -> Mapping[str, int]:
        """By name."""

    @property
    def needed(self) -> int:
        """In all."""

    @property
    def budget(self) -> int | None:
        """That the whole process may have; None: the system does not say."""

    @property
    def is_stated(self) -> bool:
        """Whether the caller said so."""

    @property
    def fits(self) -> bool:
        """Whether what is needed is within the budget."""

    def require(self) -> None:
        """Raise MemoryBudgetError unless it is."""


class Described(Protocol):
    """A model that is open and described: header, graph, ledger; nothing big is touched.

    Close it, or use it in a `with`: that closes its files, unless they are an engine's by then.
    One that is forgotten keeps no file open.
    """

    @property
    def path(self) -> str:
        """Where the model lies."""

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
        """Close the files, unless they are an engine's."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...
