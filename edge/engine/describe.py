"""What this build would run of a model file, from its header alone, and the file packed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from edge import check, models, native
from edge.device import cores
from edge.device.budget import budget_of, program_bytes
from edge.engine import plan
from edge.engine.ledger import Ledger
from edge.engine.plan import CHUNK
from edge.errors import EdgeError, InputError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.graph.graph import Graph
from edge.graph.ops import MAX_HEAD_DIM, Experts
from edge.kv.shape import KVLayout, kv_types
from edge.loading import LAYOUTS, Layout, NativeOptions
from edge.models.adapters import Adapter, GGUFHeader
from edge.models.common import Config
from edge.native import PANEL_ROWS, ffi, lib
from edge.progress import Progress
from edge.template.template import Sources
from edge.tokenizer.cost import tokenizer_bytes
from edge.weights import packed_cache
from edge.weights.joined import JoinedWeights
from edge.weights.model_file import ModelFile, open_model
from edge.weights.weights import RawWeights

__all__ = ["Description", "describe", "pack"]


@dataclass(frozen=True)
class Description:
    """What this build would run of a file, with its adapters, and the memory that it takes. chunk:
    the most tokens of one run.
    """

    graph: Graph
    config: Config
    adapters: tuple[Adapter, ...]
    weights: JoinedWeights
    lowered: plan.Lowered
    ledger: Ledger
    chunk: int = CHUNK

    @property
    def kv(self) -> KVLayout:
        """What pages of keys and values hold."""
        return self.ledger.kv

    @property
    def layouts(self) -> dict[str, str]:
        """Name of a weight -> its layout in memory."""
        return {name: self.weights.layout(name) for name in self.weights.names}

    def weight_bytes(self, name: str) -> int:
        """Bytes of a weight when it is packed."""
        return self.weights.of(name).bytes_of(name)


def describe(
    model: ModelFile,
    options: NativeOptions | None = None,
    lora: Sequence[GGUF] = (),
    *,
    kept: int | None = None,
) -> Description:
    """What this build would run of a file, from its header alone; nothing is packed.

    lora: the open file of each adapter of the options. kept: keep the inputs of matrices and
    attentions, see `edge.engine.plan.lower`, in runs of at most so many tokens. Raises
    UnsupportedError, ModelFileError, ContextError for a file that it cannot run, InputError for a
    file that is no adapter of this model, and MemoryBudgetError for a stated budget above the
    available memory. A file that needs too much memory raises nothing here: `ledger.require` does
    that.
    """
    options = options or NativeOptions()
    adapters = _adapters(model, options, lora)
    graph, config = _graph_of(model, options.context, adapters)
    added = {name for adapter in adapters for name in adapter.shapes}
    weights = JoinedWeights(
        model.weights(name for name in graph.weights if name not in added),
        [
            RawWeights(file, used, adapter.prefix)
            for file, adapter in zip(lora, adapters, strict=True)
            if (used := [name for name in adapter.shapes if name in graph.weights])
        ],
    )
    chunk = kept or CHUNK
    lowered = plan.lower(
        graph,
        weights.takes_q8,  # the plan is the same for all forms of weights
        lambda kind, dim: int(lib.edge_buffer_bytes(kind, dim, chunk)),
        keeps_inputs=kept is not None,
    )
    ledger = _settle(weights, config, graph, lowered.arena_bytes, options)
    return Description(graph, config, adapters, weights, lowered, ledger, chunk)


def pack(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: Layout = "fast",
    threads: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Pack a GGUF file into a file that runs without it. An existing target is replaced.

    progress(bytes done, bytes in all). Returns the size of the target in bytes.
    Raises what `describe` raises, InputError for a file that is packed already or a target that
    is the source itself, ModelFileError when the target cannot be written.
    """
    choice, target = cores.choose(threads), Path(check.path("target", target))
    path, layout = check.path("path", path), cast(Layout, check.choice("layout", layout, LAYOUTS))
    check.optional(check.function, "progress", progress, "(bytes done, bytes in all)")
    with open_model(path) as opened:
        model = opened.unpacked(" already: pack its source")
        if any(target.exists() and target.samefile(shard) for shard in model.paths):
            raise InputError(f"{target} is the model itself: name another file")
        weights = model.weights(_graph_of(model, None)[0].weights)
        weights.fit(layout)
        threads = native.new_threads(choice.threads, choice.cpus)
        try:
            packed_cache.write_to(
                target, packed_cache.Job.of(model, weights, whole=True), threads, progress
            )
            return target.stat().st_size
        except OSError as e:
            raise ModelFileError(f"cannot be written: {e.strerror or e}", path=target) from e
        finally:
            ffi.release(threads)


def _adapters(
    model: ModelFile, options: NativeOptions, lora: Sequence[GGUF]
) -> tuple[Adapter, ...]:
    """The adapters of a model, checked."""
    own = _header(model)
    return tuple(
        Adapter.read(_header(file), own, number=i, scale=scale)
        for i, (file, (_, scale)) in enumerate(zip(lora, options.lora, strict=True))
    )


def _header(file: ModelFile | GGUF) -> GGUFHeader:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return GGUFHeader(file.metadata, shapes, file.path)


def _graph_of(
    model: ModelFile, context: int | None, adapters: Sequence[Adapter] = ()
) -> tuple[Graph, Config]:
    """The graph of a file, and its configuration. Raises UnsupportedError, ModelFileError."""
    header = _header(model)
    graph, config = models.build(
        header.metadata, header.shapes, context=context, path=header.path, adapters=adapters
    )
    for op in graph.attentions:
        head_dim = op.heads.head_dim
        if head_dim % 16 or head_dim > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"{model.path}: heads of {head_dim}: multiples of 16 up to {MAX_HEAD_DIM} run",
                what=f"head_dim {head_dim}",
            )
    for experts in (op for op in graph.ops if isinstance(op, Experts)):
        for name in experts.weights:
            shape = graph.weights[name]
            if len(shape) == 3 and shape[1] % PANEL_ROWS:
                raise UnsupportedError(
                    f"{model.path}: {name}: experts of {shape[1]} rows: multiples of {PANEL_ROWS} "
                    "run",
                    what=f"experts of {shape[1]} rows",
                )
    return graph, config


def _settle(
    weights: JoinedWeights, config: Config, graph: Graph, buffers: int, options: NativeOptions
) -> Ledger:
    """Choose the type of keys and values and the forms of the weights. Returns their ledger.

    With kv "auto" this takes the most precise type with which the context fits, even when the
    weights must then be compact: a compact layout costs speed, a smaller type costs precision. A
    model that does not fit is no error here. A stated budget above the available memory is one
    (MemoryBudgetError).
    """
    layouts = _layouts(graph, config, options.kv)
    ledger = Ledger(
        path=config.path,
        layout=options.layout,
        weights=0,
        adapters=weights.adapter_bytes,
        least_weights=0,
        kv=layouts[0],
        context=config.n_context,
        most_context=config.n_context_train,
        positions=config.n_positions,
        sessions=options.sessions,
        buffers=buffers,
        n_vocab=graph.dims[graph.output],
        tokenizer=tokenizer_bytes(config.keys.metadata),
        template=_template_bytes(config, options.chat_template),
        packing=weights.packing_bytes,
        program=program_bytes(),
        budget=budget_of(options.memory),
        is_stated=options.memory is not None,
    )
    for kv in layouts:
        rest = replace(ledger, kv=kv, weights=0).needed
        own = weights.model
        own.fit(options.layout, None if ledger.budget is None else ledger.budget - rest)
        least = own.n_bytes - own.compact_saves
        ledger = replace(ledger, kv=kv, weights=own.n_bytes, least_weights=least)
        if ledger.fits:
            break
    return ledger


def _template_bytes(config: Config, name: str | None) -> int:
    """The bytes of the compiled chat template; 0 if it is missing or no text."""
    try:
        return Sources.from_metadata(config.keys.metadata, config.path, name).compiled_bytes
    except EdgeError:
        return 0


def _layouts(graph: Graph, config: Config, wanted: str) -> list[KVLayout]:
    """The layouts to choose from, the most precise first. Raises UnsupportedError."""
    layout = KVLayout.of(graph, config.n_context_train)
    names = kv_types() if wanted == "auto" else [wanted]
    layouts = [kv for name in names if (kv := layout.with_type(name)).is_possible]
    if not layouts:
        head_dims = sorted({group.shape.head_dim for group in layout.groups})
        raise UnsupportedError(
            f"{config.path}: keys and values of heads of {head_dims[0]} cannot be {wanted}",
            what=f"kv {wanted}",
            supported=[t for t in kv_types() if layout.with_type(t).is_possible],
        )
    return layouts
