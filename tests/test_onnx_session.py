"""Sessions, chats, their files and the commands, on ONNX graphs: as on the native kernels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onnxfolders import write_cpu, write_static
from optimum import write_optimum
from test_engine import scaled

import edge
from edge.cli import cli
from edge.errors import (
    ContextError,
    InputError,
    ModelFileError,
    SessionFileError,
    TemplateError,
    UnsupportedError,
)

Tiny = Callable[..., Path]

#: Float16 keys and values, as the native kernels keep them, so that ties are few.
LAYOUTS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "optimum": (write_optimum, {"half": True}),
    "merged": (write_optimum, {"merged": True}),
    "genai": (write_cpu, {}),
    "static": (write_static, {}),
}
PROMPT = "the world and a hello, the world"


@pytest.fixture(scope="module")
def folders(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by the name of each layout. Do not change them."""
    root = tmp_path_factory.mktemp("sessions")
    for name, (write, options) in LAYOUTS.items():
        write(tiny_gguf(), root / name, **options)
    return root


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest, folders: Path) -> Any:
    """A model of each layout, with a context of 128."""
    with edge.load(folders / request.param, threads=1, context=128) as model:
        yield model


@pytest.fixture(scope="module")
def native(tiny_gguf: Tiny) -> Any:
    with edge.load(tiny_gguf(), threads=1, context=128) as model:
        yield model


def test_the_native_back_ends_tokens(model: edge.Model, native: edge.Model) -> None:
    want = native.session().generate("the world and", max_tokens=60)
    assert model.session().generate("the world and", max_tokens=60).tokens == want.tokens


def test_the_native_back_ends_chat(model: edge.Model, native: edge.Model) -> None:
    talks = [m.chat(system="the world") for m in (model, native)]
    for question in ("hello", "and the world?"):
        mine, its = (talk.stream(question, max_tokens=12).finish() for talk in talks)
        assert (mine.text, mine.tokens) == (its.text, its.tokens)
    assert mine.usage.cached_tokens > 30  # what the first answer left
    assert talks[0].messages == talks[1].messages


def test_sampled_tokens(model: edge.Model, native: edge.Model) -> None:
    options = edge.SamplingOptions(temperature=0.7, top_k=20, seed=3)
    mine, its = (
        m.session().generate(PROMPT, max_tokens=12, sampling=options, logprobs=2)
        for m in (model, native)
    )
    assert mine.tokens == its.tokens
    assert mine.logprobs[0].logprob == pytest.approx(its.logprobs[0].logprob, abs=5e-3)


def test_pieces_are_the_answer(model: edge.Model) -> None:
    stream = model.session().stream(PROMPT, max_tokens=20)
    text = "".join(piece.text for piece in stream)
    assert text == stream.completion.text and stream.completion.finish_reason == "length"


def test_cancel_and_go_on(model: edge.Model) -> None:
    whole = model.session().generate(PROMPT, max_tokens=20).tokens
    session = model.session()
    stream = session.stream(PROMPT, max_tokens=20)
    for i, _ in enumerate(stream):
        if i == 6:
            session.cancel()
    assert stream.completion.finish_reason == "cancelled"
    first = stream.completion.tokens
    assert first == whole[: len(first)]
    assert (first + session.generate("", max_tokens=20).tokens)[:20] == whole


def test_cancel_within_a_prompt(model: edge.Model) -> None:
    session = model.session()
    tokens = list(range(100))

    def progress(done: int, total: int) -> None:
        if done:
            session.cancel()

    completion = session.stream(tokens, max_tokens=3, progress=progress).finish()
    assert completion.finish_reason == "cancelled" and session.tokens == []


def test_trim_fork_and_reuse(model: edge.Model) -> None:
    session = model.session()
    session.generate(PROMPT, max_tokens=10)
    tokens = session.tokens
    twin = session.fork()
    session.trim(8)
    session.generate("hello", max_tokens=5)
    assert twin.tokens == tokens and session.tokens[:8] == tokens[:8]
    n = len(tokens)
    assert twin.generate([*tokens, 5], reuse=True, max_tokens=1).usage.cached_tokens >= n - 1


def test_a_full_context(model: edge.Model, tmp_path: Path) -> None:
    session = model.session()
    assert session.generate(list(range(120)), max_tokens=50).finish_reason == "context"
    session.save(tmp_path / "s")
    with edge.resume(tmp_path / "s", model) as again:
        assert isinstance(again, edge.Session) and len(again.tokens) == 129
        assert again.generate("").finish_reason == "context"
    with pytest.raises(ContextError, match="more than the context of 128 holds"):
        model.session().stream(list(range(129)))


@pytest.mark.parametrize("n", [5, 70])
def test_saved_and_resumed(model: edge.Model, tmp_path: Path, n: int) -> None:
    """Nothing is computed again, and the answer is the one that would have come."""
    whole = model.session()
    whole.generate(list(range(n)), max_tokens=20)
    session = model.session()
    session.generate(list(range(n)), max_tokens=8)
    session.save(tmp_path / "s")
    found = edge.resume(tmp_path / "s", model)
    assert found.tokens == session.tokens
    rest = found.generate("", max_tokens=12)
    assert rest.usage.cached_tokens == n + 7
    assert found.tokens == whole.tokens


def test_a_journal(folders: Path, tmp_path: Path) -> None:
    """What was written before the process ended is gone on with by another model."""
    with edge.load(folders / "genai", threads=1) as model:
        talk = model.chat()
        talk.autosave(tmp_path / "s", 4)
        talk.stream("the world " * 30, max_tokens=30).finish()
        tokens = talk.session.tokens
        shutil.copy(tmp_path / "s", tmp_path / "killed")
    with edge.load(folders / "genai", threads=1) as model:
        for name in ("s", "killed"):
            found = edge.resume(tmp_path / name, model, autosave=4)
            assert isinstance(found, edge.Chat) and found.session.tokens == tokens
            assert found.stream("and", max_tokens=3).finish().usage.cached_tokens >= 64
            found.close()


def test_sessions_of_another_model(folders: Path, native: edge.Model, tmp_path: Path) -> None:
    with edge.load(folders / "genai", threads=1) as model, model.session() as session:
        session.generate(PROMPT, max_tokens=2)
        session.save(tmp_path / "s")
    with pytest.raises(SessionFileError, match=r"belongs to genai \(ONNX\), the model here is"):
        edge.resume(tmp_path / "s", native)
    with (
        edge.load(folders / "static", threads=1) as model,
        pytest.raises(SessionFileError, match=r"belongs to genai \(ONNX\)"),
    ):
        edge.resume(tmp_path / "s", model)


def test_a_damaged_file_of_a_session(folders: Path, tmp_path: Path) -> None:
    with edge.load(folders / "static", threads=1) as model, model.session() as session:
        session.generate(PROMPT, max_tokens=2)
        session.save(tmp_path / "s")
        data = bytearray((tmp_path / "s").read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "s").write_bytes(data)
        try:
            found = edge.resume(tmp_path / "s", model)
        except SessionFileError:
            return
        assert found.tokens == session.tokens  # the page is left out, and computed again
        assert found.generate("", max_tokens=1).usage.cached_tokens == 0


def test_what_cannot_be(model: edge.Model) -> None:
    with pytest.raises(UnsupportedError, match="cannot slide"):
        model.session("slide")
    with model.session() as session:
        with pytest.raises(InputError, match="keeps no prompts"):
            session.keep()
        with pytest.raises(InputError, match="token 288 at 0"):
            session.generate([288])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "text", ["the world", " a\thello\n\n", "<|im_start|>user\n", "\u00e9\u4e2d\U0001f600", ""]
)
def test_tokens_are_those_of_the_gguf(
    model: edge.Model, native: edge.Model, text: str, special: bool
) -> None:
    mine, its = model.tokenizer, native.tokenizer
    ids = its.encode(text, special=special)
    assert mine.encode(text, special=special) == ids
    assert mine.decode(ids, special=special) == its.decode(ids, special=special)
    assert mine.encode(mine.quote(text), special=True) == its.encode(text, special=False)
    assert (mine.bos_id, mine.eos_ids, mine.n_vocab) == (its.bos_id, its.eos_ids, its.n_vocab)
    assert mine.add_bos == its.add_bos and mine.space_prefix == its.space_prefix


def test_the_template_is_the_ggufs(model: edge.Model, native: edge.Model) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert model.template.render(messages) == native.template.render(messages)


def test_no_tokenizer_and_no_template(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "genai", tmp_path / "m"))
    (folder / "tokenizer_config.json").unlink()
    with edge.load(folder, threads=1) as model:
        with pytest.raises(TemplateError, match="has no chat template"):
            model.chat()
        assert model.session().generate("the world", max_tokens=2).tokens
    (folder / "tokenizer.json").unlink()
    with edge.load(folder, threads=1) as model, pytest.raises(ModelFileError, match="tokenizer"):
        model.session().generate("the world")


def test_the_command(folders: Path) -> None:
    command = ["complete", str(folders / "genai"), "-p", "the world", "-n", "4", "-t", "1"]
    done = CliRunner().invoke(cli, [*command, "--ep", "cpu", "--explain", "--report", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout.splitlines()[-1])["tokens"]) == 4
    assert "kernels onnxruntime cpu, 1 thread" in done.stderr
    assert "runs on cpu" in done.stderr and "keys and values" in done.stderr


def test_the_chat_command(folders: Path, tmp_path: Path) -> None:
    command = ["chat", str(folders / "static"), "-p", "hello", "-n", "3", "-t", "1"]
    for _ in range(2):
        done = CliRunner().invoke(cli, [*command, "--session", str(tmp_path / "s")])
        assert done.exit_code == 0, done.output
    assert "cached" in done.stderr


def test_explained_for_a_gguf(tiny_gguf: Tiny) -> None:
    done = CliRunner().invoke(
        cli, ["complete", str(tiny_gguf()), "-p", "a", "-n", "1", "--explain"]
    )
    assert done.exit_code == 0 and "runs on the CPU, all of it" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ep", "qnn", "--kv", "q8"], "kv is an option of GGUF models"),
        (["--ep", "nothing"], "ep 'nothing': one of"),
        (["--ep", "rknpu"], "rknpu is not here"),
        (["--when-full", "slide"], "cannot slide"),
    ],
)
def test_flags_that_cannot_be(folders: Path, flags: list[str], message: str) -> None:
    done = CliRunner().invoke(cli, ["complete", str(folders / "genai"), "-p", "a", *flags])
    assert done.exit_code == 1 and message in done.output


def test_keys_beyond_float16(tmp_path: Path, tiny_gguf: Tiny) -> None:
    """Graphs that keep them so cannot say whether it was that or damage: both are named."""
    path = scaled(tiny_gguf(), tmp_path / "m.gguf", "blk.0.attn_k.weight", 1e6)
    folder = write_static(path, tmp_path / "model", ep="qnn")
    with (
        edge.load(folder, threads=1, ep="cpu") as model,
        pytest.raises(ModelFileError, match=r"damaged, or .* beyond float16.*--kv q8"),
    ):
        model.session().generate([1, 2, 3], max_tokens=1)
