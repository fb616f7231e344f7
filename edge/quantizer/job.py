"""Quantising a model: each tensor is read, encoded and written, a few rows at a time.

    import edge

    edge.quantize("model-f16.gguf", "model-q4.gguf", type="Q4_0")
    edge.quantize("model-f16.gguf", "model-q4.gguf", recipe="Q4_K_M", importance="model.imatrix")
    edge.quantize("model-f16.gguf", "model-q3.gguf", recipe="IQ3_S", calibration=["text.txt"])

The source may be of any type. Memory does not grow with the model: it holds one slice as floats,
its bytes in both types, and the importance matrix. Rounding with feedback runs the model, and holds
the moments of a group of matrices and a matrix as floats, within a memory budget.
"""

from __future__ import annotations

import math
import os
import struct
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from edge import check, native
from edge.device import cores
from edge.errors import EdgeWarning, InputError, UnsupportedError
from edge.files import gguf_writer
from edge.files.gguf import GGUF, Tensor
from edge.files.gguf_reader import STRING, UINT32
from edge.native import ffi
from edge.progress import Progress, silent
from edge.quantizer import recipe as recipes
from edge.quantizer import squares
from edge.quantizer.calibration import Calibration, digest
from edge.quantizer.encode import IMPORTANCE_TYPES, Encoder
from edge.quantizer.feedback import FeedbackRounder
from edge.quantizer.imatrix import Importance
from edge.quantizer.moments import collect, passes
from edge.quantizer.recipe import Chosen, TypeChoice, Uniform
from edge.quantizer.sized import sized_types
from edge.quantizer.source import (
    Floats,
    identity,
    in_slice,
    read_floats,
    read_raw,
    read_whole,
    slices,
)
from edge.quantizer.target import SizeTarget
from edge.quantizer.types import (
    FLOATS,
    ModelTensors,
    bits_per_weight,
    needs_importance,
)
from edge.quantizer.writer import OutputFile, OutputPlan, writing
from edge.version import __version__
from edge.weights.model_file import RawModel, open_model
from edge.weights.weights import supported_types

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["QuantizeOptions", "Quantized", "explain", "quantize"]

_VERSION = 2  # of the blocks: `general.quantization_version`, as ggml numbers it
_ROUNDINGS = ("nearest", "feedback")
#: Keys of the source that this file has others of, or none.
_REPLACED = (
    *("general.file_type", "general.quantization_version", "quantize.", "edge.quantize."),
    "split.",
)


class QuantizeOptions(TypedDict, total=False):
    """What `quantize` takes: see there."""

    type: str | None
    recipe: str | os.PathLike[str] | None
    size: int | str | None
    bits: float | None
    for_memory: int | str | None
    min_speed: float | None
    importance: str | os.PathLike[str] | None
    calibration: Sequence[str | os.PathLike[str]]
    rounding: str | None
    memory: str | int | None
    threads: int | None
    progress: Progress | None


@dataclass(frozen=True)
class Quantized:
    """What was written, or would be. path: of the file, "": none; bytes: its size; bits_per_weight:
    of all tensors together; tensors: name -> type; n_continued: tensors that an earlier run wrote;
    seconds: of this run; recipe: the same types as the text of a recipe's file; to_nearest: tensors
    of which feedback would have made some rows worse, or whose moments do not fit the memory, and
    these were rounded to the nearest.
    """

    path: str
    bytes: int
    bits_per_weight: float
    tensors: dict[str, str]
    n_continued: int
    seconds: float
    recipe: str
    to_nearest: tuple[str, ...] = ()

    @property
    def types(self) -> dict[str, int]:
        """Type -> how many tensors have it, the most frequent first."""
        return dict(Counter(self.tensors.values()).most_common())


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **options: Unpack[QuantizeOptions],
) -> Quantized:
    """Write a GGUF model in other types. An existing output is replaced.

    type: that of all matrices ("Q4_0"), but where a row does not fit its blocks; or recipe: a mix
    of llama.cpp ("Q4_K_M"), a recipe that ships ("dynamicgate-low") or a TOML file, see
    `edge.quantizer.recipe`; or size: of the file at most, as "1.9GB", or bits: for each weight on
    average, or for_memory: of the process that runs it, with the default context. min_speed:
    besides, tokens per second on this machine. Then each matrix gets the type that does the least
    damage, as `edge.quantizer.damage` measures it on the calibration. importance: a file of
    `edge-run imatrix` or `llama-imatrix`.
    calibration: texts, UTF-8 files, for rounding "feedback", which is the default where there are
    some; else it is "nearest". memory, threads: as `edge.load` takes them; memory is for feedback,
    which runs the model. Where it has no room for the moments of a matrix, this is rounded to the
    nearest, by an importance that is measured. progress(weights done, weights in all); with
    feedback measuring counts as much as rounding. With a size, bits or a memory progress(steps
    done, steps in all) comes before, for the damage.

    A run that was cut leaves two hidden files beside the output; the same call goes on with them.
    Raises InputError for options, an output that is the model itself, and an importance that is
    missing or of another model; ModelFileError for a model with a weight that is no number, and a
    disk that is full; UnsupportedError. Warns (EdgeWarning) of a model that is quantised already,
    of matrices without an importance, and of experts that its text did not reach.
    """
    target = Path(check.path("output", output))
    with _Job.open(model, options) as job:
        if any(target.exists() and target.samefile(shard) for shard in job.gguf.paths):
            raise InputError(f"{target} is the model itself: name another file")
        return job.run(target)


def explain(model: str | os.PathLike[str], **options: Unpack[QuantizeOptions]) -> Quantized:
    """What `quantize` would write with these options. Raises the same errors."""
    with _Job.open(model, options) as job:
        return job.result("", 0, 0.0)


class _Job:
    """A model to quantise: its types are chosen, nothing is read. It closes the file."""

    def __init__(self, gguf: RawModel, options: QuantizeOptions) -> None:
        self.gguf = gguf
        self._texts = [check.path("calibration", text) for text in options.get("calibration", ())]
        self._rounding = _rounding(options, bool(self._texts))
        memory = check.optional(check.size, "memory", options.get("memory"))
        self._cores = cores.choose(options.get("threads"))
        self._threads = native.new_threads(self._cores.threads, self._cores.cpus)
        self._calibration = Calibration(
            gguf, self._texts, self._threads, self._cores.threads, memory
        )
        progress = options.get("progress")
        check.optional(check.function, "progress", progress, "(weights done, weights in all)")
        self._progress: Progress = progress or silent
        path = check.optional(check.path, "importance", options.get("importance"))
        self._importance = Importance.read(path) if path else None
        self._encoders = dict[str, Encoder]()
        self._model = ModelTensors.of(gguf)
        self._choice = _choice(options) or self._sized(options)
        measured = self._importance is not None or self._rounding == "feedback"
        self._types = self._choice.types(self._model, measured)
        self._check_sources()
        self._check_importance()
        kinds = {t.name: (self._types.get(t.name, t.type), t.shape) for t in gguf.tensors.values()}
        self._plan = OutputPlan.of(self._entries(), kinds, gguf.alignment)

    @classmethod
    def open(cls, model: str | os.PathLike[str], options: QuantizeOptions) -> _Job:
        """Open the model. Raises the errors of `quantize`."""
        check.names(options, list(QuantizeOptions.__annotations__))
        opened = open_model(check.path("model", model))
        try:
            return cls(opened.unpacked(": quantise the model that it was packed from"), options)
        except BaseException:
            opened.close()
            raise

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *_: object) -> None:
        ffi.release(self._threads)
        self.gguf.close()

    def run(self, target: Path) -> Quantized:
        """Write the file."""
        began, to_nearest = time.monotonic(), list[str]()
        with writing(target, self._plan, identity(self.gguf)) as output:
            continued = len(output.done)
            bar = _Weights(self.gguf, self._progress)
            bar.skip(output.done)
            if self._rounding == "feedback":
                to_nearest = self._round_with_feedback(output, bar)
            for tensor in self.gguf.tensors.values():
                if tensor.name not in output.done:
                    output.write(tensor.name, self._rounded(tensor, bar))
        seconds = time.monotonic() - began
        result = self.result(str(target), continued, seconds)
        return replace(result, to_nearest=tuple(to_nearest))

    def _round_with_feedback(self, output: OutputFile, bar: _Weights) -> list[str]:
        """Write the matrices whose moments the texts give, group by group. Returns those of which
        some rows were rounded to the nearest all the same.
        """
        types, tensors, to_nearest = self._types, self.gguf.tensors, list[str]()
        names = [
            name
            for name, kind in types.items()
            if kind not in (*FLOATS, tensors[name].type) and name not in output.done
        ]
        rounder = FeedbackRounder(self._threads, self._cores.threads)
        with self._calibration.running() as (activations, windows):
            room = self._calibration.room(activations, names)
            for group in passes(activations, names, room):
                measuring = bar.measuring(sum(math.prod(tensors[name].shape) for name in group))
                moments = collect(activations, windows, group, progress=measuring)
                for name in group:
                    weights = read_whole(tensors[name], self._threads)
                    encoder, own = self._encoder(types[name]), moments.pop(name)
                    rounded = rounder.round(encoder, weights, own)
                    output.write(name, [rounded.blocks.data.cast("B")])
                    bar.add(weights.size)
                    if any(part.is_nearest for part in rounded.ranges):
                        to_nearest.append(name)
            read = {name for site in activations.sites for name in site.weights}
            if left := [name for name in names if name in read - output.done]:
                to_nearest += left
                if self._importance is None:
                    self._importance = squares.measure(activations, windows, head=True)
        return to_nearest

    def _sized(self, options: QuantizeOptions) -> TypeChoice:
        """The types that do the least damage under a size or a number of bits."""
        if not self._texts:
            raise InputError(
                "a size, or bits, needs a text that tells what each type does: calibration"
            )
        types = sized_types(self.gguf, _target(options), self._calibration, self._progress)
        return Chosen("edge", types)

    def result(self, path: str, n_continued: int, seconds: float) -> Quantized:
        """What the file is."""
        tensors = self.gguf.tensors.values()
        kinds = {t.name: self._types.get(t.name, t.type) for t in tensors}
        size, bits = self._plan.n_bytes, bits_per_weight([*tensors], self._types)
        described = f"The types of {self._choice.name} for {self._name}: {bits:.2f} bits a weight"
        text = recipes.described(self._types, self._model, described)
        return Quantized(path, size, bits, kinds, n_continued, seconds, text)

    @property
    def _name(self) -> str:
        return str(self.gguf.metadata.get("general.name") or Path(self.gguf.path).name)

    # ---- checks before anything is written ----

    def _check_sources(self) -> None:
        """Raise UnsupportedError for a matrix that cannot be decoded; warn of those that are
        quantised already.
        """
        changed = [t for t in self._model.matrices if t.type != self._types[t.name]]
        for tensor in changed:
            if tensor.type not in supported_types():
                raise UnsupportedError(
                    f"{tensor.path}, tensor {tensor.name}: the type {tensor.type} cannot be read",
                    what=tensor.type,
                    supported=supported_types(),
                )
        lossy = [t for t in changed if t.type not in FLOATS]
        if not lossy:
            return
        kinds = ", ".join(f"{n} in {name}" for name, n in Counter(t.type for t in lossy).items())
        _warn(
            f"{self.gguf.path} is quantised already, to {bits_per_weight(lossy, {}):.2f} bits a "
            f"weight ({kinds}): the errors of both roundings add up; take the F16 or BF16 file "
            "where there is one"
        )

    def _check_importance(self) -> None:
        """Raise InputError for an importance that is missing or of another model."""
        needing = [n for n, kind in self._types.items() if needs_importance(n, kind)]
        if self._importance is None:
            if needing and self._rounding == "nearest":
                raise InputError(
                    f"{self._types[needing[0]]}, which {len(needing)} tensors get, needs an "
                    "importance matrix: make one with `edge-run imatrix`, and give it (--imatrix), "
                    "or give a text (--calibration)"
                )
            return
        self._importance.require_of({t.name: t.shape for t in self._model.tensors})
        missing = [name for name in self._types if name not in self._importance.inputs]
        if lacking := [name for name in missing if name in needing]:
            raise InputError(
                f"{self._importance.path} has no importance of {_some(lacking)}, which "
                f"{self._types[lacking[0]]} needs: is it of another model?"
            )
        if lacking := [name for name in missing if name.startswith("blk.")]:
            _warn(f"{self._importance.path} has no importance of {_some(lacking)}: none is used")
        for name, experts in self._importance.unreached().items():
            if name in self._types:
                _warn(
                    f"{name}: no token of the importance's text reached experts "
                    f"{_some([*map(str, experts)])}: all their columns count the same"
                )

    # ---- what is written ----

    def _entries(self) -> list[bytes]:
        """The keys of the file."""
        number, text = _number, _text
        entries = gguf_writer.copied(self.gguf.metadata, self.gguf.headers()[0], _is_kept)
        entries += [
            number("general.file_type", self._choice.file_type(self._types)),
            number("general.quantization_version", _VERSION),
            text("edge.quantize.version", __version__),
            text("edge.quantize.recipe", self._choice.name),
            text("edge.quantize.rounding", self._rounding),
        ]
        if self._rounding == "feedback":
            digests = self._calibration.digests
            entries.append(gguf_writer.strings("edge.quantize.calibration", digests))
        if (importance := self._importance) is not None:
            entries.append(text("edge.quantize.importance", digest(importance.path)))
            entries.append(text("quantize.imatrix.file", Path(importance.path).name))
            entries += [text("quantize.imatrix.dataset", name) for name in importance.datasets[:1]]
            entries.append(number("quantize.imatrix.entries_count", len(importance.inputs)))
            entries.append(number("quantize.imatrix.chunks_count", importance.chunk_count))
        return entries

    def _rounded(self, tensor: Tensor, bar: _Weights) -> Iterator[bytes | memoryview]:
        """The bytes of a tensor as it is written, to the nearest, a slice at a time."""
        type_name = self._types.get(tensor.name, tensor.type)
        weight = self._weight(tensor, type_name)
        for rows in slices(tensor):
            if type_name == tensor.type:
                yield read_raw(tensor, rows)
            else:
                x = read_floats(tensor, rows, self._threads)
                of_rows = weight[rows.matrix] if weight is not None and weight.ndim > 1 else weight
                with in_slice(tensor, rows):
                    yield self._encoder(type_name).encode(x, of_rows, self._threads).data.cast("B")
            self.gguf.forget()
            bar.add(rows.n * tensor.shape[-1])

    def _encoder(self, type_name: str) -> Encoder:
        """The encoder of a type, whose tables are made once."""
        if type_name not in self._encoders:
            self._encoders[type_name] = Encoder(type_name)
        return self._encoders[type_name]

    def _weight(self, tensor: Tensor, type_name: str) -> Floats | None:
        """The importance of a tensor's columns, (k,) or (n_experts, k)."""
        if type_name in (*FLOATS, tensor.type):
            return None
        if self._importance is not None:
            mean = self._importance.mean(tensor.name, tensor.shape)
            if mean is not None:
                return mean
        return np.ones(tensor.shape[-1], np.float32) if type_name in IMPORTANCE_TYPES else None


class _Weights:
    """Tells how many weights are done; those that were measured count once more."""

    def __init__(self, gguf: GGUF, progress: Progress) -> None:
        self._sizes = {name: math.prod(t.shape) for name, t in gguf.tensors.items()}
        self._progress = progress
        self._done, self._total = 0, sum(self._sizes.values())

    def skip(self, names: Iterable[str]) -> None:
        """These are done."""
        self.add(sum(self._sizes[name] for name in names))

    def add(self, n: int) -> None:
        """n more are done."""
        self._done += n
        self._progress(self._done, self._total)

    def measuring(self, n: int) -> Progress:
        """The progress of measuring n weights."""
        first = self._done
        self._total += n

        def progress(done: int, total: int) -> None:
            self._done = first
            self.add(n * done // max(1, total))

        return progress


def _rounding(options: QuantizeOptions, has_texts: bool) -> str:
    """How weights are rounded. Raises InputError for feedback without a text."""
    default = "feedback" if has_texts else "nearest"
    rounding = check.choice("rounding", options.get("rounding") or default, _ROUNDINGS)
    if rounding == "feedback" and not has_texts:
        raise InputError("rounding 'feedback' needs a text that the model runs: calibration")
    return rounding


def _choice(options: QuantizeOptions) -> TypeChoice | None:
    """The types that the options ask for; None: they must be measured. Raises InputError unless one
    option says what the types are.
    """
    given = [
        key
        for key in ("type", "recipe", "size", "bits", "for_memory")
        if options.get(key) is not None
    ]
    if len(given) != 1:
        raise InputError(
            "say one of these: the type of all matrices, a recipe, a size, bits, a memory"
        )
    if given[0] in ("type", "recipe") and options.get("min_speed") is not None:
        raise InputError("a speed goes with a size, bits or a memory")
    if given == ["type"]:
        return Uniform(check.text("type", options.get("type")))
    if given == ["recipe"]:
        return recipes.find(check.path("recipe", options.get("recipe")))
    return None


def _target(options: QuantizeOptions) -> SizeTarget:
    """What the file may take. Raises InputError for numbers that cannot be."""

    def above_0(name: str, value: Any, most: float) -> float:
        return check.number(name, value, 0, most, above=True)

    return SizeTarget(
        size=check.optional(check.size, "size", options.get("size")),
        bits=check.optional(above_0, "bits", options.get("bits"), 32),
        memory=check.optional(check.size, "for_memory", options.get("for_memory")),
        min_speed=check.optional(above_0, "min_speed", options.get("min_speed"), 1e6),
    )


def _is_kept(key: str) -> bool:
    return not key.startswith(_REPLACED)


def _number(key: str, value: int) -> bytes:
    return gguf_writer.entry(key, UINT32, struct.pack("<I", value))


def _text(key: str, value: str) -> bytes:
    valid = value.encode("utf-8", "replace").decode()  # names of files may be no Unicode
    return gguf_writer.entry(key, STRING, gguf_writer.string(valid))


def _some(names: Sequence[str]) -> str:
    """Some names for a message."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _warn(message: str) -> None:
    warnings.warn(message, EdgeWarning, stacklevel=6)
