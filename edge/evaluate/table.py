"""Files of one model, measured against a base: size, quality, speed and memory of each.

    comparison = Comparison("model-f16.gguf", ("model-q4.gguf", "model-q3.gguf"))
    for evaluation in evaluate(comparison, TextFile.open("text.txt")):
        print(evaluation.facts.path, evaluation.perplexity)

One model is in memory at a time, and one part of its layers where a GGUF file is too large for
that. The base runs once, and its logits stay in a file of the cache
folder until the end: 4 bytes for each scored position and token of the vocabulary. The file has no
name, so nothing is left of it even if the process is killed. The numbers are those of
`edge.perplexity.compare` with both models in memory, bit for bit.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from edge import perplexity
from edge.bench.rounds import Measurement, Settings, measure_files
from edge.bench.runner import Case
from edge.disk.room import cache_dir
from edge.engine.engine import DescribedFile
from edge.engine.parts import ModelInParts
from edge.errors import CancelledError, EdgeError, InputError, UnsupportedError
from edge.files.file_types import FILE_TYPES
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.loading import Loading
from edge.model import Model, load
from edge.native.cancel import Cancel
from edge.onnx import is_onnx
from edge.perplexity import Divergence, KeptLogits, Perplexity, TokenList
from edge.progress import Progress
from edge.sizes import show

if TYPE_CHECKING:
    from edge.files.text_file import TextFile
    from edge.weights.weights import Stored

__all__ = ["Comparison", "Evaluation", "FileFacts", "evaluate"]

#: The most tokens that are decoded one by one where speed is measured.
N_DECODE = 64
#: Rounds of the measurement of speed.
ROUNDS = 3
#: Steps of the progress of one model.
_STEPS = 10_000
#: The most characters of a recipe's name.
_NAME = 80

#: Called with (what is done, done, in all).
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    base: the model that the files were quantised from, or another one of the same vocabulary.
    context, chunks: see `edge.perplexity.cut`. has_speed: whether to measure speeds. threads: None:
    the engine's own choice. loading: layout and memory, as `edge.load` takes them.
    """

    base: str
    files: tuple[str, ...]
    context: int = 512
    chunks: int | None = None
    has_speed: bool = True
    threads: int | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """The base, then the files."""
        return (self.base, *self.files)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `edge.load`."""
        return {**self.loading, "threads": self.threads, "context": self.context}


@dataclass(frozen=True)
class FileFacts:
    """What the header of a model file says.

    recipe: how it was quantised, see `recipe_of`. n_bytes: of the file, or of all shards. bits: per
    weight, of all tensors; layer_bits: of the matrices in the layers, so without embeddings, head
    and norms. memory_bytes: what a process needs to run it with the windows' context, as
    `edge-run plan` counts. fits: whether that is within the memory budget; if not, the file runs
    part by part, and its speed is not measured.
    """

    path: str
    recipe: str
    n_bytes: int
    bits: float
    layer_bits: float
    memory_bytes: int
    fits: bool


@dataclass(frozen=True)
class Evaluation:
    """A file, measured. divergence: from the base; None: it is the base. prompt_speed,
    decode_speed: tokens per second, of a prompt as long as a window and of single tokens in an
    empty context: the median of the rounds; None: not measured.
    """

    facts: FileFacts
    perplexity: Perplexity
    divergence: Divergence | None = None
    prompt_speed: float | None = None
    decode_speed: float | None = None


def evaluate(
    comparison: Comparison,
    text: TextFile,
    *,
    progress: Report | None = None,
    cancel: Cancel | None = None,
) -> Iterator[Evaluation]:
    """Measure the base, then each file. What was yielded stays valid when a later file fails.

    All headers are read first, so that a file that cannot be compared is found before the work.
    Raises InputError for no file, a file that is named twice, another vocabulary than the base's,
    a text that is too short, and a disk without room for the base's logits; CancelledError; what
    `edge.load` and `edge.perplexity.compare` raise; OSError.
    """
    report = progress or (lambda what, done, total: None)
    facts = _facts_of_all(comparison)
    with _scratch() as file:
        kept = _run_base(comparison, text, file, report, cancel)
        speeds = _speeds(comparison, facts, report, cancel)
        yield Evaluation(facts[0], kept.perplexity, None, *speeds[0])
        for i, path in enumerate(comparison.files, 1):
            with _loaded(path, comparison, report) as model:
                divergence = perplexity.compare(
                    model,
                    kept,
                    kept.windows,
                    progress=_part(report, i, comparison),
                    cancel=cancel,
                )
            yield Evaluation(facts[i], divergence.model, divergence, *speeds[i])


def recipe_of(metadata: Mapping[str, Any], path: str) -> str:
    """How a file was quantised: the recipe that `edge-run quantize` writes into it, or the name of
    its file type, or else the file's own name.
    """
    recipe = metadata.get("edge.quantize.recipe")
    if isinstance(recipe, str) and (name := "".join(filter(str.isprintable, recipe)).strip()):
        return name[:_NAME]
    number = metadata.get("general.file_type")
    if isinstance(number, int) and number in FILE_TYPES:
        return FILE_TYPES[number]
    return os.path.basename(path).removesuffix(".gguf")


def bits_per_weight(tensors: Collection[Stored]) -> float:
    """Bits that the types of these tensors take per weight; 0.0 for no tensors."""
    n_bytes = n_weights = 0
    for tensor in tensors:
        n = math.prod(tensor.shape)
        of_type = TENSOR_TYPES[TYPE_NUMBERS[tensor.type]]
        n_weights += n
        n_bytes += n // of_type.block * of_type.block_bytes
    return 8 * n_bytes / n_weights if n_weights else 0.0


# ---- headers ----


def _facts_of_all(comparison: Comparison) -> list[FileFacts]:
    """The facts of the base and of each file. Raises what `evaluate` raises of headers."""
    if not comparison.files:
        raise InputError("there is no file to compare with the base")
    seen = set[tuple[int, int]]()
    facts = list[FileFacts]()
    base: TokenList | None = None
    for path in comparison.paths:
        if is_onnx(path):
            raise UnsupportedError(f"{path}: GGUF models are compared", what="compare")
        options = Loading.of(comparison.options).for_native(path)
        with DescribedFile.open(path, options) as described:
            facts.append(_facts_of(described))
            if described.file.is_packed:
                described.ledger.require()
            vocabulary = _vocabulary_of(described)
        if not facts[-1].fits:
            with ModelInParts(path, options) as model:
                model.ledger.require()
        base = base or vocabulary
        perplexity.check_vocabularies(vocabulary, base)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            raise InputError(f"{path} is named twice")
        seen.add((status.st_dev, status.st_ino))
    return facts


def _facts_of(described: DescribedFile) -> FileFacts:
    file = described.file
    tensors = file.tensors.values()
    matrices = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1]
    return FileFacts(
        path=described.path,
        recipe=recipe_of(file.metadata, described.path),
        n_bytes=file.n_bytes,
        bits=bits_per_weight(tensors),
        layer_bits=bits_per_weight(matrices),
        memory_bytes=described.ledger.needed,
        fits=described.ledger.fits,
    )


def _vocabulary_of(described: DescribedFile) -> TokenList:
    graph = described.description.graph
    tokens = described.file.metadata.get("tokenizer.ggml.tokens", [])
    return TokenList(described.path, graph.dims[graph.output], tokens)


# ---- running ----


@contextmanager
def _scratch() -> Iterator[IO[bytes]]:
    """A file of the cache folder that has no name, or loses it at the end."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix=".logits-") as file:
        yield file


def _run_base(
    comparison: Comparison,
    text: TextFile,
    file: IO[bytes],
    report: Report,
    cancel: Cancel | None,
) -> KeptLogits:
    """Run the base on the windows of the text. file: gets its logits."""
    context, chunks = comparison.context, comparison.chunks
    with _loaded(comparison.base, comparison, report) as model:
        content = perplexity.read(text, [model], context, chunks)
        windows = perplexity.cut(model, content, context=context, chunks=chunks, cancel=cancel)
        del content
        n_vocab = (model if isinstance(model, ModelInParts) else model.engine).n_vocab
        _check_room(4 * windows.n_scored * n_vocab)
        part = _part(report, 0, comparison)
        return perplexity.keep(model, windows, file, progress=part, cancel=cancel)


def _check_room(needed: int) -> None:
    """Raise InputError where the disk has no room for so many bytes of logits."""
    folder = cache_dir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the base's logits need {show(needed)} in {folder} until the end, {show(free)} are "
            "free: take fewer windows (--chunks), or set EDGE_CACHE to a folder of another disk"
        )


@contextmanager
def _loaded(path: str, comparison: Comparison, report: Report) -> Iterator[Model | ModelInParts]:
    """A model, until the `with` ends: in parts where it does not fit into memory."""
    options = Loading.of(comparison.options).for_native(path)
    with DescribedFile.open(path, options) as described:
        fits = described.ledger.fits or described.file.is_packed
    if not fits:
        with ModelInParts(path, options) as parts:
            yield parts
        return
    with load(
        path,
        progress=lambda done, total: report("loading", done, total),
        **comparison.options,
    ) as model:
        yield model


def _part(report: Report, i: int, comparison: Comparison) -> Progress:
    """The progress of the i-th run, as a part of the progress of all."""
    n = _STEPS * len(comparison.paths)
    return lambda done, total: report("measuring", _STEPS * i + _STEPS * done // total, n)


def _speeds(
    comparison: Comparison, facts: list[FileFacts], report: Report, cancel: Cancel | None
) -> list[tuple[float | None, float | None]]:
    """(prompt speed, decode speed) of the base and of each file, where these fit into memory."""
    paths = [f.path for f in facts if f.fits and comparison.has_speed]
    if not paths:
        return [(None, None)] * len(facts)

    def go_on(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if cancel is not None and cancel.is_set():
            raise CancelledError("the call was cancelled")

    options, n = dict(comparison.loading), comparison.context
    cases = (Case("prompt", n), Case("decode", min(n, N_DECODE)))
    settings = Settings(cases, (comparison.threads,), ROUNDS, options=options)
    try:
        measured = measure_files(paths, settings, go_on)
    except EdgeError:
        if cancel is not None and cancel.is_set():  # Ctrl-C ended the other process, too
            raise CancelledError("the call was cancelled") from None
        raise
    found = dict(zip(paths, map(_medians, measured), strict=True))
    return [found.get(f.path, (None, None)) for f in facts]


def _medians(measurement: Measurement) -> tuple[float, float]:
    rounds = [outcome.speeds for outcome in measurement.rounds["edge"]]
    prompt, decode = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
    return prompt, decode
