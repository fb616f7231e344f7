"""An engine that runs ONNX graphs in onnxruntime. Sessions use it like the native engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge import forked
from edge.device import cores
from edge.errors import CancelledError, ContextError, InputError, ModelFileError
from edge.files.json_file import JsonFile
from edge.kv.shape import PAGE
from edge.loading import Loading, LoadOptions, OnnxOptions
from edge.onnx.files.folder import Decoder, Folder, Static, open_folder
from edge.onnx.providers import compiled, providers
from edge.onnx.providers.sessions import OpenedGraph, explain
from edge.onnx.run.budget import OnnxLedger
from edge.onnx.run.runners import DecoderRunner, StaticRunner, most_tokens
from edge.progress import Progress
from edge.version import __version__

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from edge.kv.shape import WhenFull
    from edge.native.cancel import Cancel
    from edge.onnx.run.kv import HostCache
    from edge.onnx.run.runners import Runner, Want
    from edge.template.template import ChatTemplate
    from edge.tokenizer import Tokenizer

__all__ = ["DescribedFolder", "OnnxConfig", "OnnxEngine", "config_of", "fingerprint_of"]

_CONTEXT = 4096  # tokens, if neither the caller nor a fixed shape says another number
_SAMPLES, _SAMPLE_BYTES = 1024, 4096  # of each file, for the fingerprint


@dataclass(frozen=True)
class OnnxConfig:
    """n_context: positions that a session may use. n_context_train: positions that the model was
    made for, 0: unknown.
    """

    n_context: int
    n_context_train: int


class DescribedFolder:
    """A folder of ONNX graphs that was read and described, see `edge.backend.Described`.

    Get one with `DescribedFolder.open`. No file stays open, and onnxruntime opens nothing before
    `start`. ledger: the memory that the model would need.
    """

    def __init__(self, folder: Folder, options: OnnxOptions) -> None:
        self.folder, self.options = folder, options
        self.config = config_of(folder, options.context)
        self.ledger = OnnxLedger.draw_up(folder, self.config.n_context, options)

    @classmethod
    def open(cls, path: str | os.PathLike[str], options: OnnxOptions | None = None) -> Self:
        """Read a folder of ONNX graphs, or one .onnx file.

        Raises ModelFileError, UnsupportedError, ContextError, and MemoryBudgetError for a stated
        budget above the available memory. Whether the model fits is for `ledger.require`.
        """
        return cls(open_folder(path), options or OnnxOptions())

    @property
    def path(self) -> str:
        """The folder, or the file, as the user named it."""
        return os.fspath(self.folder.path)

    def new_tokenizer(self) -> Tokenizer:
        """Build the model's tokenizer. Raises ModelFileError, UnsupportedError."""
        from edge.tokenizer import Tokenizer

        folder = self.folder
        return Tokenizer.from_folder(folder.root, folder.n_vocab, folder.bos_id, folder.eos_ids)

    def new_template(self) -> ChatTemplate:
        """Build the model's chat template. Raises TemplateError if it has none, ModelFileError."""
        from edge.template.budget import Limits
        from edge.template.template import ChatTemplate

        limits = Limits.of_context(self.config.n_context)
        return ChatTemplate.from_folder(self.folder.root, limits, self.options.chat_template)

    def start(self, progress: Progress | None = None) -> OnnxEngine:
        """Load the graphs in onnxruntime. progress(bytes done, bytes in all).

        Raises MemoryBudgetError, ModelFileError, UnsupportedError, InputError.
        """
        self.ledger.require()
        options = self.options
        target = providers.choose(
            options.ep,
            self.folder.made_for,
            threads=cores.choose(options.threads).threads,
            fallback=options.fallback,
            soc=options.soc,
        )
        engine = OnnxEngine(self, target)
        engine._open(progress)
        return engine

    def close(self) -> None:
        """Do nothing: no file is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class OnnxEngine:
    """A loaded model, see `edge.backend.Backend`; `DescribedFolder.start` makes one.

    folder: the description of the model. target: the provider and device that it runs on. opened:
    onnxruntime's sessions by graph. chunk: most tokens of one call of `run`.
    """

    keeps_prompts = False
    notes: tuple[str, ...] = ()
    refused: str | None = None

    def __init__(self, described: DescribedFolder, target: providers.Target) -> None:
        self.folder, self.target = described.folder, target
        self.config, self.ledger = described.config, described.ledger
        self.chunk, self.n_vocab = most_tokens(self.folder), self.folder.n_vocab
        self.recommended = _recommended(described)
        self.isa = f"onnxruntime {target.provider.name}"
        self.opened: dict[str, OpenedGraph] = {}
        self._runner: Runner | None = None
        self._fingerprint: bytes | None = None
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        forked.watch(self)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        **options: Unpack[LoadOptions],
    ) -> OnnxEngine:
        """Open and start a model in one call.

        options: see `edge.loading.Loading`. Raises what `DescribedFolder` raises.
        """
        with DescribedFolder.open(path, Loading.of(options).for_onnx()) as described:
            return described.start(progress)

    @property
    def path(self) -> str:
        """The folder, or the file, as the user named it."""
        return os.fspath(self.folder.path)

    @property
    def threads(self) -> int:
        """The threads that onnxruntime may use; a provider of another device may ignore them."""
        return self.target.threads

    @property
    def page_bytes(self) -> Sequence[int]:
        """Bytes of a page of keys and values, of the one layer group."""
        return [PAGE * self._running().layout.position_bytes]

    @property
    def fingerprint(self) -> bytes:
        """See `fingerprint_of`."""
        with self._lock:
            if self._fingerprint is None:
                self._fingerprint = fingerprint_of(self.folder)
            return self._fingerprint

    def facts(self) -> dict[str, Any]:
        """The facts that a saved session depends on, as JSON values."""
        layout = self._running().layout
        return {
            "edge": __version__,
            "model": f"{self.folder.name} (ONNX)",
            "fingerprint": self.fingerprint.hex(),
            "kv": {
                "type": layout.dtype,
                "n_layers": layout.n_layers,
                "n_kv_heads": layout.n_kv_heads,
                "head_dim": layout.head_dim,
            },
            "factors": None,
            "native_bf16": False,
            "context": self.config.n_context,
        }

    def info(self) -> dict[str, Any]:
        """Facts about the model, as JSON values. Sizes in bytes, contexts in tokens."""
        folder, layout = self.folder, self._running().layout
        return {
            "path": self.path,
            "name": folder.name,
            "architecture": folder.architecture,
            "graphs": {name: os.fspath(graph.path) for name, graph in folder.graphs.items()},
            "provider": self.target.provider.name,
            "layers": folder.n_layers,
            "vocabulary": self.n_vocab,
            "context": self.config.n_context,
            "context_trained": self.config.n_context_train,
            "threads": self.threads,
            "isa": self.isa,
            "file_bytes": sum(file.stat().st_size for file in folder.files),
            "cache_bytes": layout.position_bytes * self.config.n_context,
        }

    def explain(self) -> list[str]:
        """Lines for people: the provider of each graph, and how much of the graph it runs."""
        self._running()
        return explain(self.opened)

    def cache(self, when_full: WhenFull = "stop") -> HostCache:
        """A new, empty cache. Raises InputError, UnsupportedError for `when_full` slide."""
        return self._running().cache(when_full)

    def run(
        self,
        cache: HostCache,
        tokens: Sequence[int],
        *,
        logits: Want = "last",
        cancel: Cancel | None = None,
    ) -> NDArray[np.float32] | None:
        """Run 1 to `chunk` tokens behind those in the cache, and add them to it.

        Returns logits (rows, n_vocab) of the last token, or of all tokens, or None. `cancel` is
        read between runs of onnxruntime. Raises ContextError if the tokens do not fit, InputError
        for a token that is not in the vocabulary, CancelledError (the cache is then unchanged),
        ModelFileError if onnxruntime fails, or if the logits are not finite.
        """
        n = len(tokens)
        with self._lock:
            runner = self._running()
            if not 1 <= n <= self.chunk:
                raise InputError(f"{n} tokens in one run: from 1 to {self.chunk}")
            if not 0 <= min(tokens) <= max(tokens) < self.n_vocab:
                raise InputError(
                    f"token ids from {min(tokens)} to {max(tokens)}: 0 to {self.n_vocab - 1}"
                )
            start = cache.length
            cache.reserve(start + n)
            n_done, rows = 0, list[NDArray[np.float32]]()
            for size in runner.pieces(start, n, logits):
                if cancel is not None and cancel.is_set():
                    raise CancelledError("the call was cancelled")
                piece = tokens[n_done : n_done + size]
                new = self._step(cache, start + n_done, piece, logits)
                n_done += size
                if new is not None and (logits == "all" or n_done == n):
                    rows.append(new if logits == "all" else new[-1:])
            cache.append(tokens)
        if len(rows) > 1:
            return np.concatenate(rows)
        return rows[0] if rows else None

    def close(self) -> None:
        """Free the model. A running call ends first; later calls raise InputError.

        In a forked child it does nothing, because onnxruntime's threads do not exist there.
        """
        if self._lock is forked.REFUSAL:
            return
        with self._lock:
            self._runner = None
            self.opened = {}

    def _forked(self) -> None:
        self._lock = forked.REFUSAL

    def _open(self, progress: Progress | None) -> None:
        """Load the graphs in onnxruntime."""
        if progress:
            progress(0, self.folder.weight_bytes)
        key = self.fingerprint if self.target.provider.compiles else None
        self.opened = compiled.open_sessions(self.folder.graphs, self.target, key)
        sessions = {name: opened.session for name, opened in self.opened.items()}
        if isinstance(self.folder, Static):
            self._runner = StaticRunner(self.folder, sessions, self.config.n_context)
        elif isinstance(self.folder, Decoder):
            self._runner = DecoderRunner(self.folder, sessions, self.config.n_context)
        if progress:
            progress(self.folder.weight_bytes, self.folder.weight_bytes)

    def _running(self) -> Runner:
        forked.check(self._lock)
        if self._runner is None:
            raise InputError("the model was closed")
        return self._runner

    def _step(
        self, cache: HostCache, start: int, tokens: Sequence[int], logits: Want
    ) -> NDArray[np.float32] | None:
        """One run of onnxruntime; its logits (rows, n_vocab), or None. Raises ModelFileError."""
        try:
            rows = self._running().run(cache, start, tokens, logits)
        except Exception as e:  # onnxruntime's exceptions have no common base class
            if not (isinstance(e, RuntimeError) or type(e).__module__.startswith("onnxruntime")):
                raise
            raise ModelFileError(
                f"onnxruntime cannot run it: {' '.join(str(e).split())}", path=self.path
            ) from e
        with np.errstate(all="ignore"):
            is_finite = rows is None or np.isfinite(rows.sum())  # a sum keeps NaN and infinity
        if not is_finite:
            cause = "the weights are damaged"
            if self.folder.dtype == "float16":
                cause += (
                    ", or keys and values are beyond float16, in which these graphs keep them: run "
                    "the model's GGUF file with --kv q8"
                )
            raise ModelFileError(f"the logits came out NaN or infinite: {cause}", path=self.path)
        return rows


def config_of(folder: Folder, wanted: int | None) -> OnnxConfig:
    """The positions of a session. wanted: by the caller. Raises InputError, ContextError."""
    most, is_fixed = folder.context, isinstance(folder, Static)
    if wanted is not None and most is not None and wanted > most:
        hint = f": export it anew with --context {wanted}" if is_fixed else ""
        raise ContextError(
            f"{folder.path}: a context of {wanted} tokens was asked for, the model was made for "
            f"{most}{hint}",
            needed=wanted,
            limit=most,
        )
    n_context = wanted or (most if is_fixed else None) or min(_CONTEXT, most or _CONTEXT)
    return OnnxConfig(n_context, most or 0)


def _recommended(described: DescribedFolder) -> dict[str, Any]:
    """What generation_config.json says, of sampling among others. Raises ModelFileError."""
    if not described.options.model_sampling:
        return {}
    return JsonFile.find(described.folder.root / "generation_config.json").values


def fingerprint_of(folder: Folder) -> bytes:
    """A hash of 32 bytes over samples of a model's files."""
    out = blake2b(digest_size=32)
    for file in folder.files:
        try:
            with open(file, "rb") as data:
                size = os.fstat(data.fileno()).st_size
                out.update(f"{file.name} {size} ".encode())
                for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                    data.seek(start)
                    out.update(data.read(_SAMPLE_BYTES))
        except OSError as e:
            raise ModelFileError(f"cannot be read: {e.strerror or e}", path=file) from e
    return out.digest()
