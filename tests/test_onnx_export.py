"""Exports: what is in the folder, when it appears, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import assert_one_line, edge_run, run
from test_onnx_cpu import open_session

from edge.engine.describe import pack
from edge.errors import ContextError, InputError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.onnx.export import config
from edge.onnx.export.export import Recipe, export
from edge.tokenizer import Tokenizer
from edge.tokenizer.vocabulary import Vocabulary

CPU, NPU = Recipe("cpu"), Recipe("npu", ep="cpu", context=64)
FILES = {
    "cpu": {"model.onnx", "model.onnx.data", "genai_config.json"},
    "npu": {"embedding.onnx", "chunk.onnx", "token.onnx", "weights.data", "edge.json"},
}
BESIDE = {"tokenizer.json", "tokenizer_config.json"}
WORDS = "Hello world<|im_end|>\n and a  \ttab: caf\u00e9 \U0001f642 <|im_start|>hello"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def tiny(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf("llama", type="Q4_0", tied=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where exports go: a folder that is not there, in one that is."""
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "model"


# ---- the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [CPU, NPU], ids=lambda recipe: recipe.dialect)
def test_files_and_facts(tiny: Path, out: Path, recipe: Recipe) -> None:
    facts = export(tiny, out, recipe)
    sizes = {name: len(data) for name, data in contents(out).items()}
    assert sizes.keys() == FILES[recipe.dialect] | BESIDE
    assert facts["files"] == sizes and facts["bytes"] == sum(sizes.values())
    assert facts["context"] == (recipe.context or 256)
    assert (facts["dialect"], facts["architecture"]) == (recipe.dialect, "llama")


@pytest.mark.parametrize("recipe", [CPU, NPU], ids=lambda recipe: recipe.dialect)
def test_the_same_bytes_every_time(tiny: Path, tmp_path: Path, recipe: Recipe) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        export(tiny, folder, recipe)
    assert contents(folders[0]) == contents(folders[1])


def test_progress_is_of_the_weights(tiny: Path, out: Path) -> None:
    seen: list[tuple[int, int]] = []
    export(tiny, out, CPU, progress=lambda done, total: seen.append((done, total)))
    with GGUF.open(tiny) as model:
        total = sum(tensor.n_bytes for tensor in model.tensors.values())
    assert {pair[1] for pair in seen} == {total}
    assert seen == sorted(seen) and seen[-1][0] == total


def test_weights_stay_quantised(tiny_gguf: Callable[..., Path], out: Path) -> None:
    path = tiny_gguf("llama", type="Q4_0", dim=512, ffn=1024, vocab=2048)
    facts = export(path, out, Recipe("cpu", context=16))
    assert facts["files"]["model.onnx.data"] < 1.15 * path.stat().st_size  # scales of 4 bytes


def test_the_graph_runs_from_the_folder_alone(tiny: Path, out: Path) -> None:
    export(tiny, out, CPU)
    moved = out.rename(out.with_name("elsewhere"))
    session = open_session(moved / "model.onnx")
    feeds = {"input_ids": np.array([[1, 2]]), "attention_mask": np.ones((1, 2), np.int64)}
    for value in session.get_inputs()[2:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    assert np.isfinite(session.run(["logits"], feeds)[0]).all()


def test_interface_of_the_graph(tiny: Path, out: Path) -> None:
    export(tiny, out, CPU)
    session = open_session(out / "model.onnx")
    shapes = {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_ids"] == [1, "sequence_length"]
    assert shapes["attention_mask"] == [1, "total_sequence_length"]
    assert shapes["logits"] == [1, 1, 288]
    for i in range(2):
        for part in ("key", "value"):
            past, present = f"past_key_values.{i}.{part}", f"present.{i}.{part}"
            assert shapes[past] == [1, 2, "past_sequence_length", 16]
            assert shapes[present] == [1, 2, "total_sequence_length", 16]
    assert len(shapes) == 3 + 2 * 2 * 2


def test_genai_config(tiny: Path, out: Path) -> None:
    export(tiny, out, Recipe("cpu", context=100))
    values = read(out, "genai_config.json")
    model, decoder = values["model"], values["model"]["decoder"]
    assert (model["bos_token_id"], model["eos_token_id"][0]) == (285, 287)
    assert sorted(model["eos_token_id"]) == [285, 287]  # <|endoftext|> ends, too
    assert (model["context_length"], model["vocab_size"]) == (100, 288)
    assert values["search"] == {"max_length": 100, "past_present_share_buffer": True}
    assert (decoder["head_size"], decoder["num_key_value_heads"]) == (16, 2)
    names = {v.name for v in open_session(out / decoder["filename"]).get_inputs()}
    assert decoder["inputs"]["past_key_names"] % 1 in names


# ---- the tokenizer -------------------------------------------------------------------------------


def test_tokenizer_is_ours(tiny: Path, out: Path) -> None:
    import tokenizers

    export(tiny, out, CPU)
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    with GGUF.open(tiny) as model:
        ours = Tokenizer.from_metadata(model.metadata)
        template = model.metadata["tokenizer.chat_template"]
    ids = ours.encode(WORDS, special=True)
    assert theirs.encode(WORDS).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids, special=True)
    special = {i for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert special == {i for i in range(ours.n_vocab) if ours.is_special(i)}
    settings = read(out, "tokenizer_config.json")
    assert settings["chat_template"] == template
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert settings["add_bos_token"] is False


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", "<extra>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [2, 3, 3, 1, 1, 1, 1, 1, 4] + [6] * 256
    keys = {
        "model": "llama",
        "tokens": pieces,
        "token_type": kinds,
        "scores": [0.0] * 3 + [-1.0, -2.0, -3.0, -0.5, -0.25] + [0.0] * 257,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece_too(tmp_path: Path, space: bool, bos: bool) -> None:
    import tokenizers

    metadata = sentencepiece(add_space_prefix=space, add_bos_token=bos)
    backend = config.complete_tokenizer(Vocabulary.from_metadata(metadata, "model"))
    theirs = tokenizers.Tokenizer.from_str(backend.to_str())
    ours = Tokenizer.from_metadata(metadata)
    for text in ("ab abab", "<extra>ab", "\u00e9 ab</s>"):
        ids = ours.encode(text, special=True)
        assert theirs.encode(text).ids == ids
        if "<extra>" not in text:  # a space behind an added token is what they cannot know of
            assert theirs.decode(ids) == ours.decode(ids)


# ---- when it appears -----------------------------------------------------------------------------


def left(out: Path) -> list[str]:
    """What lies where exports go, hidden or not."""
    return sorted(os.listdir(out.parent))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_export_that_is_interrupted_leaves_nothing(
    tiny: Path, out: Path, error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        export(tiny, out, CPU, progress=stop)
    assert left(out) == []


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
def test_a_full_disk(tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelFileError, match="cannot be written: No space left"):
        export(tiny, out, CPU)
    assert left(out) == []


def test_an_earlier_export_is_replaced_when_forced(
    tiny: Path, tiny_gguf: Callable[..., Path], out: Path
) -> None:
    export(tiny, out, NPU)
    with pytest.raises(InputError, match="holds an export already: --force replaces it"):
        export(tiny, out, CPU)
    assert (out / "edge.json").exists()
    export(tiny, out, CPU, force=True)
    assert set(contents(out)) == FILES["cpu"] | BESIDE
    assert left(out) == ["model"]


def test_an_earlier_export_stays_when_the_next_fails(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tiny, out, CPU)
    before, rename = contents(out), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == out and (self / "edge.json").exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ModelFileError, match="cannot be written: Input/output error"):
        export(tiny, out, NPU, force=True)
    assert contents(out) == before and left(out) == ["model"]


def test_an_empty_folder_will_do(tiny: Path, out: Path) -> None:
    out.mkdir()
    export(tiny, out, CPU)
    assert (out / "model.onnx").exists() and left(out) == ["model"]


def test_what_is_no_export_is_never_replaced(tiny: Path, out: Path) -> None:
    export(tiny, out, CPU)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and no export"):
        export(tiny, out, CPU, force=True)
    with pytest.raises(InputError, match="is not empty, and no export"):
        export(tiny, tiny.parent, CPU, force=True)
    with pytest.raises(InputError, match="is there already, and no folder"):
        export(tiny, tiny, CPU, force=True)
    assert (out / "notes.txt").exists()


def test_a_link_to_a_folder_stays_a_link(tiny: Path, out: Path) -> None:
    (out.parent / "real").mkdir()
    out.symlink_to("real")
    export(tiny, out, CPU)
    assert out.is_symlink() and (out.parent / "real" / "model.onnx").exists()


def test_no_folder_to_write_in(tiny: Path, out: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be written: No such file"):
        export(tiny, out / "below" / "that", CPU)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dialect": "gpu"}, "dialect 'gpu': one of cpu, npu"),
        ({"dialect": "cpu", "ep": "qnn"}, "ep is for dialect npu alone"),
        ({"dialect": "cpu", "chunk": 64}, "chunk is for dialect npu alone"),
        ({"dialect": "cpu", "weights": "int8"}, "weights is for dialect npu alone"),
        ({"dialect": "cpu", "calibration": "text"}, "calibration is for dialect npu alone"),
        ({"dialect": "npu", "ep": "abacus"}, "provider 'abacus': one of"),
        ({"dialect": "npu", "ep": "coreml", "weights": "int8"}, "coreml takes float16"),
    ],
)
def test_recipes_that_contradict_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**options)


def test_packed_files_are_refused(tiny: Path, out: Path) -> None:
    packed = out.with_name("packed.gguf")
    pack(tiny, packed)
    with pytest.raises(InputError, match="is packed: export its source"):
        export(packed, out, CPU)
    assert left(out) == ["packed.gguf"]


def test_contexts_beyond_the_model(tiny: Path, out: Path) -> None:
    with pytest.raises(ContextError, match="made for 256"):
        export(tiny, out, Recipe("cpu", context=257))


def test_damaged_files_are_refused(tiny: Path, out: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-4096])
    with pytest.raises(ModelFileError):
        export(cut, out, CPU)
    assert left(out) == []


def test_a_vector_that_is_nan(tiny_gguf: Callable[..., Path], out: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    shutil.copy(tiny_gguf("llama"), path)
    with GGUF.open(path) as model:
        offset = model.tensors["output_norm.weight"].offset
    with path.open("r+b") as file:
        file.seek(offset + 8)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(ModelFileError, match=r"output_norm\.weight at byte \d+: .*column 2 is"):
        export(path, out, CPU)
    assert left(out) == []


def test_without_the_package_onnx(tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match='pip install "onnx>='):
        export(tiny, out, CPU)


# ---- the command ---------------------------------------------------------------------------------


def test_command(tiny: Path, out: Path) -> None:
    facts = json.loads(
        run("export", str(tiny), "-o", str(out), "--dialect", "cpu", "--json").stdout
    )
    assert facts["path"] == str(out) and facts["model"] == str(tiny)
    assert facts["bytes"] == sum(len(data) for data in contents(out).values())
    again = edge_run("export", tiny, "-o", out, "--dialect", "cpu")
    assert_one_line(again.returncode, again.stderr, "--force replaces it")
    text = run("export", str(tiny), "-o", str(out), "--dialect", "cpu", "--force").stdout
    assert text.startswith(f"{out}: ")


def test_command_for_an_npu(tiny: Path, out: Path) -> None:
    options = ["--dialect", "npu", "--ep", "cpu", "--context", "96", "--chunk", "64"]
    run("export", str(tiny), "-o", str(out), *options)
    facts = read(out, "edge.json")
    assert (facts["provider"], facts["context"], facts["chunk"]) == ("cpu", 96, 64)
