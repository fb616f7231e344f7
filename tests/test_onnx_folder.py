"""What a folder is: each layout told by its files, each thing that is wrong told by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import run
from onnx import TensorProto, helper
from onnxfolders import write_cpu, write_static
from optimum import edit, write_optimum

from edge.cli.info import describe_graphs
from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.onnx.files.folder import Decoder, Static, open_folder

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `optimum`, `cpu` and `static`. Do not change them: `copy`."""
    root = tmp_path_factory.mktemp("folders")
    write_optimum(tiny_gguf(), root / "optimum")
    write_cpu(tiny_gguf(), root / "cpu")
    write_static(tiny_gguf(), root / "static")
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """copy(name) -> a folder that may be changed."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def set_json(path: Path, *keys: str, to: Any) -> None:
    """Change a value, or take it away: None."""
    whole = values = json.loads(path.read_text())
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    if to is None:
        values.pop(keys[-1], None)
    else:
        values[keys[-1]] = to
    path.write_text(json.dumps(whole))


def add_input(name: str, kind: int, shape: list[Any]) -> Callable[[Any], None]:
    return lambda model: model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))


def test_a_folder_of_optimum(made: Path) -> None:
    folder = open_folder(made / "optimum")
    assert isinstance(folder, Decoder)
    assert (folder.n_layers, folder.n_kv_heads, folder.head_dim) == (2, 2, 16)
    assert (folder.dtype, folder.n_vocab, folder.context) == ("float32", 288, 256)
    assert folder.positions == "position_ids" and not folder.branch and not folder.is_shared
    assert (folder.name, folder.architecture, folder.made_for) == ("optimum", "llama", "cpu")
    assert folder.eos_ids == (287,) and folder.bos_id == 285


def test_a_folder_of_genai(made: Path) -> None:
    folder = open_folder(made / "cpu")
    assert isinstance(folder, Decoder)
    assert folder.is_shared and folder.last_only and not folder.positions
    assert (folder.n_layers, folder.n_kv_heads, folder.head_dim) == (2, 2, 16)
    assert len(folder.files) == 2


def test_a_folder_of_ours(made: Path) -> None:
    folder = open_folder(made / "static")
    assert isinstance(folder, Static)
    assert (folder.context, folder.chunk, folder.window) == (128, 8, 0)
    assert folder.made_for == "cpu" and len(folder.files) == 4
    assert set(folder.graphs) == {"embedding", "chunk", "token"}


def test_one_file_of_several(copy: Callable[[str], Path]) -> None:
    folder = copy("optimum")
    (folder / "onnx" / "model.onnx").rename(folder / "onnx" / "model_q4.onnx")
    assert open_folder(folder).graphs["model"].path.name == "model_q4.onnx"
    shutil.copy(folder / "onnx" / "model_q4.onnx", folder / "onnx" / "model_fp16.onnx")
    with pytest.raises(ModelFileError, match=r"model_fp16.onnx, model_q4.onnx: name one of them"):
        open_folder(folder)
    found = open_folder(folder / "onnx" / "model_q4.onnx")
    assert found.root == folder and found.context == 256 and found.name == "model_q4"


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"looked for edge.json, genai_config.json, model.onnx"
    ):
        open_folder(tmp_path)
    with pytest.raises(ModelFileError, match="no such file or folder"):
        open_folder(tmp_path / "absent.onnx")
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match=r"it has x.onnx: name one of them"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_input("pixel_values", 1, [1]), "wants the input 'pixel_values', which edge does not"),
        (lambda m: m.graph.input.pop(1), "has no input 'attention_mask'"),
        (lambda m: m.graph.input.pop(3), r"has no input 'past_key_values.0.key'"),
        (lambda m: m.graph.output.pop(), "has no output 'logits'"),
        (lambda m: m.graph.output.pop(0), r"has no output 'present.0.key'"),
    ],
)
def test_names_that_are_missing_or_strange(
    copy: Callable[[str], Path], change: Callable[[Any], None], message: str
) -> None:
    path = copy("optimum") / "onnx" / "model.onnx"
    with pytest.raises(UnsupportedError, match=message):
        open_folder(edit(path, change))


def test_no_keys_and_values_at_all(copy: Callable[[str], Path]) -> None:
    def change(model: Any) -> None:
        del model.graph.input[3:]

    with pytest.raises(UnsupportedError, match="exported with keys and values"):
        open_folder(edit(copy("optimum") / "onnx" / "model.onnx", change))


@pytest.mark.parametrize(
    ("place", "index", "kind"),
    [
        ("input", 0, TensorProto.FLOAT),
        ("input", 1, TensorProto.BOOL),
        ("input", 2, TensorProto.FLOAT),
        ("input", 3, TensorProto.FLOAT16),  # of all the others float32
        ("input", 3, TensorProto.BFLOAT16),
        ("output", 0, TensorProto.DOUBLE),
        ("output", -1, TensorProto.BFLOAT16),
        ("output", -1, 99),
    ],
)
def test_types_that_edge_does_not_feed(
    copy: Callable[[str], Path], place: str, index: int, kind: int
) -> None:
    def change(model: Any) -> None:
        getattr(model.graph, place)[index].type.tensor_type.elem_type = kind

    with pytest.raises(UnsupportedError, match=r"is of .*supported"):
        open_folder(edit(copy("optimum") / "onnx" / "model.onnx", change))


@pytest.mark.parametrize(
    ("index", "shape", "kind", "message"),
    [
        (0, [1, 64], UnsupportedError, "has the fixed shape"),
        (3, [1, 2, 128, 16], UnsupportedError, "has the fixed shape"),
        (3, [1, 4, "past", 16], UnsupportedError, "layers that differ"),
        (3, [1, 2, "past"], ModelFileError, "of other than 4"),
        (0, ["n"], ModelFileError, "of other than 2"),
    ],
)
def test_shapes_that_edge_does_not_feed(
    copy: Callable[[str], Path], index: int, shape: list[Any], kind: type, message: str
) -> None:
    def change(model: Any) -> None:
        old = model.graph.input[index]
        made = helper.make_tensor_value_info(old.name, old.type.tensor_type.elem_type, shape)
        old.CopyFrom(made)

    with pytest.raises(kind, match=message):
        open_folder(edit(copy("optimum") / "onnx" / "model.onnx", change))


def test_shapes_that_only_config_json_knows(copy: Callable[[str], Path]) -> None:
    def change(model: Any) -> None:
        for value in [*model.graph.input[3:], *model.graph.output[:-1]]:
            for i in (1, 3):
                value.type.tensor_type.shape.dim[i].dim_param = "?"

    folder = copy("optimum")
    edit(folder / "onnx" / "model.onnx", change)
    found = open_folder(folder)
    assert (found.n_kv_heads, found.head_dim) == (2, 16)
    for key, layers in (("num_key_value_heads", [2, 2]), ("num_attention_heads", [4, 4])):
        set_json(folder / "config.json", key, to=layers)
        found = open_folder(folder)
        assert (found.n_kv_heads, found.head_dim) == (2, 16)
    set_json(folder / "config.json", "num_attention_heads", to=[4, 2])
    with pytest.raises(UnsupportedError, match="layers that differ"):
        open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedError, match="of unknown shape"):
        open_folder(folder)


def test_without_config_json(copy: Callable[[str], Path]) -> None:
    folder = copy("optimum")
    (folder / "config.json").unlink()
    found = open_folder(folder)
    assert found.context is None and found.eos_ids == () and found.head_dim == 16


def test_generation_config_names_the_ends(copy: Callable[[str], Path]) -> None:
    folder = copy("optimum")
    (folder / "generation_config.json").write_text('{"eos_token_id": [287, 3]}')
    assert open_folder(folder).eos_ids == (287, 3)


@pytest.mark.parametrize(
    ("keys", "value", "kind", "message"),
    [
        (("model", "decoder", "pipeline"), [], UnsupportedError, "a pipeline of several graphs"),
        (("model", "vision"), {}, UnsupportedError, "a model with vision"),
        (("model", "decoder", "filename"), "../model.onnx", ModelFileError, "not the name of a"),
        (("model", "decoder", "filename"), None, ModelFileError, "filename: is missing"),
        (("model", "decoder", "filename"), "other.onnx", ModelFileError, "cannot be read"),
        (("model", "decoder", "num_hidden_layers"), None, ModelFileError, "is missing"),
        (("model", "decoder", "num_hidden_layers"), 1 << 40, ModelFileError, "from 1 to 1024"),
        (
            ("model", "decoder", "num_hidden_layers"),
            True,
            ModelFileError,
            "where a whole number belongs",
        ),
        (("model", "decoder", "num_hidden_layers"), 3, UnsupportedError, r"_values.2.key'"),
        (("model", "decoder", "num_hidden_layers"), 1, UnsupportedError, "which edge does not"),
        (("model", "decoder", "inputs", "past_key_names"), "k.%d", UnsupportedError, r"'k.0'"),
        (("model", "eos_token_id"), "2", ModelFileError, "no token id"),
        (("model", "eos_token_id"), [2, -1], ModelFileError, "no token id"),
        (("model",), [], ModelFileError, "where an object belongs"),
        (("search", "past_present_share_buffer"), 1, ModelFileError, "where true or false belongs"),
    ],
)
def test_genai_config_that_is_wrong(
    copy: Callable[[str], Path], keys: tuple[str, ...], value: Any, kind: type, message: str
) -> None:
    folder = copy("cpu")
    set_json(folder / "genai_config.json", *keys, to=value)
    with pytest.raises(kind, match=message):
        open_folder(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("[1]", "holds a list"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"model": ' + "9" * 5000 + "}", "is no JSON|where an object belongs"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (" " * (17 << 20), "more than"),
    ],
)
@pytest.mark.parametrize("name", ["edge.json", "genai_config.json"])
def test_files_that_are_no_json(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelFileError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("format", 2, UnsupportedError, "format 2.*export the model anew"),
        ("format", None, ModelFileError, "is missing"),
        ("dialect", "cpu", UnsupportedError, "dialect 'cpu'"),
        ("context", 64, ModelFileError, r"edge.json makes it \(1, 1, 8, 72\) of"),
        ("context", 0, ModelFileError, "from 1 to"),
        ("chunk", 16, ModelFileError, "edge.json makes it"),
        ("n_layers", 1, ModelFileError, r"'new_key.1' is float32 .*knows none of that"),
        ("n_layers", 3, UnsupportedError, r"no output 'new_key.2'"),
        ("n_vocab", 289, ModelFileError, "'logits' is float32"),
        ("n_kv_heads", -1, ModelFileError, "from 1 to"),
        ("provider", 3, ModelFileError, "where a text belongs"),
    ],
)
def test_edge_json_that_is_wrong(
    copy: Callable[[str], Path], key: str, value: Any, kind: type, message: str
) -> None:
    folder = copy("static")
    set_json(folder / "edge.json", key, to=value)
    with pytest.raises(kind, match=message):
        open_folder(folder)


@pytest.mark.parametrize("name", ["embedding.onnx", "chunk.onnx", "token.onnx", "weights.data"])
def test_a_file_of_ours_is_missing(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("static")
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=r"cannot be read|missing"):
        open_folder(folder)
    (folder / name).write_bytes(b"\x00" * 100)
    with pytest.raises(EdgeError, match=r"no ONNX model|cut short"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["optimum", "cpu", "static"])
def test_info(made: Path, name: str) -> None:
    facts = describe_graphs(str(made / name))
    assert facts["layers"] == facts["kv_heads"] == 2 and facts["vocabulary"] == 288
    assert facts["bytes"] == sum(
        file.stat().st_size
        for file in (made / name).rglob("*")
        if ".onnx" in file.name or file.name == "weights.data"
    )
    command = run("info", str(made / name))
    assert command.exit_code == 0 and "multiply-adds a token" in command.stdout
    assert json.loads(run("info", "--json", str(made / name)).stdout) == facts
