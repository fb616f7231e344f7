"""Describes a folder of ONNX graphs: whose export it is, and the inputs and outputs of its graphs.

    edge.json              edge's export of dialect npu: embedding.onnx, chunk.onnx and token.onnx
    genai_config.json      a decoder for onnxruntime-genai, such as edge's export of dialect cpu
    [onnx/]model*.onnx     a decoder that optimum exported

The description comes from the files alone, before onnxruntime opens one of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge.errors import ModelFileError, UnsupportedError, brief
from edge.files.json_file import JsonFile
from edge.onnx.files.proto import OnnxFile, Value

__all__ = ["MASKED", "Decoder", "Folder", "KVNames", "Static", "open_folder", "static_shapes"]

#: The mask of a static graph adds this to a score that must not count. float16 can hold it, and
#: real scores are far smaller.
MASKED = -3e4

_FORMAT = 1  # of edge.json
_MOST_LAYERS = 1024
_MOST_CONTEXT = 1 << 24

_PAST = re.compile(r"past_key_values\.(\d{1,4})\.(key|value)")
_INDEX, _FLOAT = ("int64", "int32"), ("float32", "float16")


@dataclass(frozen=True)
class Folder:
    """A model that can be run.

    path: as the user named it. root: the folder of the tokenizer. made_for: the provider that the
    graphs were made for. context: tokens that the model was made for, None: unknown. bos_id,
    eos_ids: as the model's own files name them, else None and (). dtype: of keys and values.
    """

    path: Path
    root: Path
    graphs: dict[str, OnnxFile]
    name: str
    architecture: str
    made_for: str
    context: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: str
    n_vocab: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all graphs; a weight in two graphs counts twice."""
        return sum(graph.weight_bytes for graph in self.graphs.values())

    @property
    def files(self) -> list[Path]:
        """All files of the graphs, without duplicates."""
        return sorted({file for graph in self.graphs.values() for file in graph.files})


@dataclass(frozen=True)
class KVNames:
    """The names of a layer's keys and values. past: inputs; present: outputs."""

    past: tuple[str, str]
    present: tuple[str, str]


@dataclass(frozen=True)
class Decoder(Folder):
    """One graph, whose inputs are tokens and the keys and values of all tokens before them.

    ids, mask, logits: names. positions, rows and branch: names of optional inputs, "" where the
    graph has none: rows is the number of tokens, from the last, whose logits are made (0: all);
    branch says whether there are keys and values of earlier tokens.
    is_shared: the graph writes new keys and values into the buffer of the old ones.
    last_only: the graph makes logits only of the last token.
    """

    ids: str
    mask: str
    logits: str
    positions: str
    rows: str
    branch: str
    kv: tuple[KVNames, ...]
    is_shared: bool
    last_only: bool


@dataclass(frozen=True)
class Static(Folder):
    """Graphs of fixed shapes, an export of edge.

    chunk: tokens of chunk.onnx. window: positions that a token sees, itself included; 0: all.
    dim, half: the widths of `hidden` and of `cos`.
    """

    chunk: int
    window: int
    dim: int
    half: int


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Describe a folder, or one .onnx file. Raises ModelFileError, UnsupportedError."""
    place = Path(os.fsdecode(path))
    if place.is_dir():
        if (place / "edge.json").exists():
            return _static(place, JsonFile.read(place / "edge.json"))
        if (place / "genai_config.json").exists():
            return _genai(place, JsonFile.read(place / "genai_config.json"))
        return _optimum(place, _choose(place))
    if not place.exists():
        raise ModelFileError("no such file or folder", path=place)
    return _optimum(place, place)


def _choose(folder: Path) -> Path:
    """The file to run in a folder of optimum. Raises ModelFileError."""
    files: dict[str, Path] = {}
    for part in (folder / "onnx", folder):
        files |= {file.name: file for file in sorted(part.glob("*.onnx"))}
    for name in ("model.onnx", "decoder_model_merged.onnx"):
        if name in files:
            return files[name]
    if len(models := [name for name in files if name.startswith("model")]) == 1:
        return files[models[0]]
    content = "it has no .onnx file"
    if files:
        content = f"it has {', '.join(sorted(files))}: name one of them"
    raise ModelFileError(
        "is no model: looked for edge.json, genai_config.json, model.onnx and onnx/model.onnx, "
        + content,
        path=folder,
    )


# ---- decoders of one graph ----


@dataclass(frozen=True)
class _Facts:
    """The facts in the files beside a graph. A number that is None must follow from the graph."""

    path: Path
    root: Path
    architecture: str
    context: int | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    n_kv_heads: int | None
    head_dim: int | None
    is_shared: bool


def _optimum(path: Path, file: Path) -> Decoder:
    root = file.parent
    if root.name == "onnx" and not (root / "config.json").exists():
        root = root.parent
    config = JsonFile.find(root / "config.json")
    inner = config.inside("text_config")
    both = JsonFile(config.path, {**inner.values, **config.values})
    ends = JsonFile.find(root / "generation_config.json").ids("eos_token_id")
    heads = _of_layers(both, "num_attention_heads")
    head_dim = both.whole("hidden_size", 0) // heads if heads else 0
    graph = OnnxFile.read(file)
    layers = [int(m[1]) for name in graph.inputs if (m := _PAST.fullmatch(name))]
    kv = tuple(
        KVNames(
            (f"past_key_values.{i}.key", f"past_key_values.{i}.value"),
            (f"present.{i}.key", f"present.{i}.value"),
        )
        for i in range(max(layers, default=0) + 1)
    )
    bos = both.ids("bos_token_id")
    facts = _Facts(
        path=path,
        root=root,
        architecture=both.get("model_type", str, ""),
        context=both.whole("max_position_embeddings", 0, most=_MOST_CONTEXT)
        or both.whole("n_positions", 0, most=_MOST_CONTEXT)
        or None,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(ends or both.ids("eos_token_id")),
        n_kv_heads=_of_layers(both, "num_key_value_heads") or heads or None,
        head_dim=both.whole("head_dim", 0) or head_dim or None,
        is_shared=False,
    )
    names = {"ids": "input_ids", "mask": "attention_mask", "positions": "position_ids"}
    return _decoder(graph, facts, {**names, "logits": "logits"}, kv)


def _of_layers(config: JsonFile, key: str) -> int:
    """A whole number, or the one value of a list of numbers, one for each layer.

    0: it is missing, or the layers differ, so that it must follow from the graph.
    """
    values = config.values.get(key)
    if isinstance(values, list):
        if not values or values.count(values[0]) < len(values):
            return 0
        config = JsonFile(config.path, {key: values[0]})
    return config.whole(key, 0)


def _genai(folder: Path, config: JsonFile) -> Decoder:
    model = config.inside("model")
    decoder = model.inside("decoder")
    _check_genai(folder, model, decoder)
    inputs, outputs = decoder.inside("inputs"), decoder.inside("outputs")
    n_layers = decoder.whole("num_hidden_layers", most=_MOST_LAYERS)
    keys = {
        "past_key": inputs.get("past_key_names", str, "past_key_values.%d.key"),
        "past_value": inputs.get("past_value_names", str, "past_key_values.%d.value"),
        "key": outputs.get("present_key_names", str, "present.%d.key"),
        "value": outputs.get("present_value_names", str, "present.%d.value"),
    }

    def named(key: str, i: int) -> str:
        return keys[key].replace("%d", str(i))

    kv = tuple(
        KVNames(
            (named("past_key", i), named("past_value", i)), (named("key", i), named("value", i))
        )
        for i in range(n_layers)
    )
    name = decoder.text("filename")
    if name in (".", "..") or "/" in name or "\\" in name:
        raise decoder.error("filename", f"{brief(name)} is not the name of a file in this folder")
    bos = model.ids("bos_token_id")
    facts = _Facts(
        path=folder,
        root=folder,
        architecture=model.get("type", str, ""),
        context=model.whole("context_length", 0, most=_MOST_CONTEXT) or None,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(model.ids("eos_token_id")),
        n_kv_heads=decoder.whole("num_key_value_heads", 0) or None,
        head_dim=decoder.whole("head_size", 0) or None,
        is_shared=config.inside("search").get("past_present_share_buffer", bool, False),
    )
    names = {
        "ids": inputs.get("input_ids", str, "input_ids"),
        "mask": inputs.get("attention_mask", str, "attention_mask"),
        "positions": inputs.get("position_ids", str, "position_ids"),
        "logits": outputs.get("logits", str, "logits"),
    }
    return _decoder(OnnxFile.read(folder / name), facts, names, kv)


def _check_genai(folder: Path, model: JsonFile, decoder: JsonFile) -> None:
    """Raise UnsupportedError for a model of more than one graph."""
    if "pipeline" in decoder.values:
        raise UnsupportedError(
            f"{folder}: a pipeline of several graphs (decoder.pipeline in genai_config.json): edge "
            "runs one graph, or what `edge-run export` made of a GGUF",
            what="decoder.pipeline",
        )
    for part in ("encoder", "vision", "speech", "embedding"):
        if part in model.values:
            raise UnsupportedError(
                f"{folder}: a model with {part}, edge runs decoders of text", what=part
            )


def _decoder(
    graph: OnnxFile, facts: _Facts, names: Mapping[str, str], kv: tuple[KVNames, ...]
) -> Decoder:
    """Describe a decoder, whose inputs are told apart by their names.

    Raises UnsupportedError, ModelFileError.
    """
    optional = {
        "positions": names["positions"],
        "rows": "num_logits_to_keep",
        "branch": "use_cache_branch",
    }
    past = [name for layer in kv for name in layer.past]
    present = [name for layer in kv for name in layer.present]
    wanted = [names["ids"], names["mask"], *past]
    _check_names(graph, "input", wanted, {*wanted, *optional.values()})
    _check_names(graph, "output", [names["logits"], *present])
    types: dict[str, tuple[str, ...]] = {
        names["ids"]: _INDEX,
        names["mask"]: _INDEX,
        names["positions"]: _INDEX,
    }
    types |= {"num_logits_to_keep": _INDEX, "use_cache_branch": ("bool",)}
    types |= dict.fromkeys(past, _FLOAT)
    for value in graph.inputs.values():
        _check_type(graph, value, types[value.name])
    dtype = graph.inputs[past[0]].dtype
    for value in (graph.inputs | graph.outputs).values():
        if value.name in {*past, *present}:
            _check_type(graph, value, (dtype,))
    logits = graph.outputs[names["logits"]]
    _check_type(graph, logits, _FLOAT)
    n_kv_heads, head_dim = _heads(graph, past, facts)
    rows, n_vocab = _dim(graph, logits.dims, 3), _dim(graph, logits.dims, 3, -1)
    ids = graph.inputs[names["ids"]]
    if isinstance(_dim(graph, ids.dims, 2, 1), int):
        raise UnsupportedError(
            f"{graph.path}: input {ids.name} has the fixed shape {list(ids.dims or ())}, edge "
            "wants graphs that take any number of tokens, or its own export of dialect npu",
            what="fixed shapes",
        )
    if not isinstance(n_vocab, int) or n_vocab < 1:
        raise ModelFileError("logits of no known number", path=graph.path, field=logits.name)
    return Decoder(
        path=facts.path,
        root=facts.root,
        graphs={"model": graph},
        name=facts.path.resolve().stem if facts.path.is_file() else facts.path.resolve().name,
        architecture=facts.architecture,
        made_for="cpu",
        context=facts.context,
        bos_id=facts.bos_id,
        eos_ids=facts.eos_ids,
        n_layers=len(kv),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        n_vocab=n_vocab,
        ids=names["ids"],
        mask=names["mask"],
        logits=names["logits"],
        **{key: name if name in graph.inputs else "" for key, name in optional.items()},
        kv=kv,
        is_shared=facts.is_shared,
        last_only=rows == 1,
    )


def _heads(graph: OnnxFile, past: Iterable[str], facts: _Facts) -> tuple[int, int]:
    """Key heads and their dimensions, from the graph, or else from the files beside it."""
    shapes: set[tuple[int | str | None, int | str | None]] = set()
    for name in past:
        dims = graph.inputs[name].dims
        heads, head_dim = _dim(graph, dims, 4, 1), _dim(graph, dims, 4, 3)
        shapes.add(
            (
                heads if isinstance(heads, int) else facts.n_kv_heads,
                head_dim if isinstance(head_dim, int) else facts.head_dim,
            )
        )
        if isinstance(_dim(graph, dims, 4, 2), int):
            raise UnsupportedError(
                f"{graph.path}: input {name} has the fixed shape {list(dims or ())}, edge wants "
                "keys and values of any length, or its own export of dialect npu",
                what="fixed shapes",
            )
    heads, head_dim = shapes.pop()
    if shapes or not (isinstance(heads, int) and isinstance(head_dim, int)):
        raise UnsupportedError(
            f"{graph.path}: keys and values of layers that differ, or of unknown shape",
            what="shapes of keys and values",
        )
    if heads < 1 or head_dim < 1:
        raise ModelFileError(f"{heads} heads of {head_dim} dimensions", path=graph.path)
    return heads, head_dim


def _dim(
    graph: OnnxFile, dims: tuple[int | str, ...] | None, rank: int, i: int = 1
) -> int | str | None:
    """Dimension i of a shape; None where the graph gives no shape.

    Raises ModelFileError unless the shape has `rank` dimensions.
    """
    if dims is None:
        return None
    if len(dims) != rank:
        raise ModelFileError(f"a shape {list(dims)} of other than {rank}", path=graph.path)
    return dims[i]


def _check_names(
    graph: OnnxFile, what: str, wanted: Iterable[str], known: Iterable[str] | None = None
) -> None:
    """Raise UnsupportedError for inputs or outputs that are missing, or unknown.

    what: "input" or "output". known: None: any other name may be there, too.
    """
    values = graph.inputs if what == "input" else graph.outputs
    missing = [name for name in wanted if name not in values]
    if missing:
        raise UnsupportedError(
            f"{graph.path} has no {what} {_some(missing)}, it has {_some(list(values))}: edge runs "
            "decoders exported with keys and values (past_key_values)",
            what=f"no {what} {missing[0]}",
        )
    unknown = [] if known is None else [name for name in values if name not in set(known)]
    if unknown:
        raise UnsupportedError(
            f"{graph.path} wants the {what} {_some(unknown)}, which edge does not know",
            what=f"{what} {unknown[0]}",
            supported=sorted({name for name in known or () if not _PAST.fullmatch(name)}),
        )


def _check_type(graph: OnnxFile, value: Value, types: tuple[str, ...]) -> None:
    if value.dtype not in types:
        raise UnsupportedError(
            f"{graph.path}: {value.name} is of {value.dtype or 'no tensor type'}",
            what=f"{value.name} of {value.dtype}",
            supported=types,
        )


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(brief(name) for name in names[:most]) + more


# ---- edge's own graphs of fixed shapes ----


def _static(folder: Path, config: JsonFile) -> Static:
    version = config.whole("format")
    if version != _FORMAT or config.text("dialect") != "npu":
        raise UnsupportedError(
            f"{config.path}: format {version}, dialect {brief(config.text('dialect'))}: export the "
            "model anew with this version of edge",
            what=f"format {version}",
            supported=[f"format {_FORMAT}, dialect npu"],
        )
    names = ("embedding", "chunk", "token")
    graphs = {name: OnnxFile.read(folder / f"{name}.onnx") for name in names}
    tables = graphs["embedding"].outputs
    _check_names(graphs["embedding"], "output", ["hidden", "cos", "sin"])
    dim = _dim(graphs["embedding"], tables["hidden"].dims, 3, 2)
    half = _dim(graphs["embedding"], tables["cos"].dims, 3, 2)
    dtype = next((v.dtype for v in graphs["token"].inputs.values() if "past_" in v.name), "")
    bos = config.ids("bos_token_id")
    if not isinstance(dim, int) or not isinstance(half, int):
        raise ModelFileError("hidden, cos or sin of no fixed width", path=folder / "embedding.onnx")
    static = Static(
        path=folder,
        root=folder,
        graphs=graphs,
        name=config.get("name", str, "") or folder.resolve().name,
        architecture=config.get("architecture", str, ""),
        made_for=config.text("provider"),
        context=config.whole("context", most=_MOST_CONTEXT),
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(config.ids("eos_token_ids")),
        n_layers=config.whole("n_layers", most=_MOST_LAYERS),
        n_kv_heads=config.whole("n_kv_heads"),
        head_dim=config.whole("head_dim"),
        dtype=dtype,
        n_vocab=config.whole("n_vocab"),
        chunk=config.whole("chunk", most=4096),
        window=config.whole("window", 0, most=_MOST_CONTEXT),
        dim=dim,
        half=half,
    )
    _check_static(static)
    return static


def _check_static(folder: Static) -> None:
    """Raise ModelFileError unless the graphs have the shapes that follow from edge.json."""
    for name, n in (("chunk", folder.chunk), ("token", 1)):
        graph = folder.graphs[name]
        inputs, outputs = static_shapes(folder, n, head=name == "token")
        for what, values, shapes in (
            ("input", graph.inputs, inputs),
            ("output", graph.outputs, outputs),
        ):
            for value in values.values():
                wanted = shapes.get(value.name)
                dtype = folder.dtype if value.name.startswith(("past", "new")) else "float32"
                if (value.dims, value.dtype) != (wanted, dtype) or dtype not in _FLOAT:
                    expected = "knows none of that name" if wanted is None else f"makes it {wanted}"
                    raise ModelFileError(
                        f"{what} {brief(value.name)} is {value.dtype} {value.dims}, edge.json "
                        f"{expected} of {dtype}: export the model anew",
                        path=graph.path,
                    )
            if (
                what == "output" or name == "token"
            ):  # a chunk's last layer reads no keys of the cache
                _check_names(graph, what, shapes)


def static_shapes(
    folder: Static, n: int, *, head: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of the inputs and outputs of a graph of n tokens. head: it makes logits."""
    context, heads, head_dim = folder.context or 0, folder.n_kv_heads, folder.head_dim
    inputs: dict[str, tuple[int, ...]] = {
        "hidden": (1, n, folder.dim),
        "cos": (1, n, folder.half),
        "sin": (1, n, folder.half),
        "mask": (1, 1, n, context + n),
    }
    outputs: dict[str, tuple[int, ...]] = {"logits": (1, 1, folder.n_vocab)} if head else {}
    for i in range(folder.n_layers):
        inputs[f"past_key.{i}"] = (1, heads, head_dim, context)
        inputs[f"past_value.{i}"] = (1, heads, context, head_dim)
        outputs[f"new_key.{i}"] = (1, heads, head_dim, n)
        outputs[f"new_value.{i}"] = (1, heads, n, head_dim)
    return inputs, outputs
