"""Texts of people: whatever editor wrote them, and no more of them than is wanted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, assert_one_line, run

import edge
from edge.errors import InputError
from edge.files.text_file import TextFile
from edge.windows import MIN_CONTEXT

BOM = b"\xef\xbb\xbf"
TEXT = "Once upon a time ü\n"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """The models that were loaded, fakes all of them."""
    models: list[FakeModel] = []

    def load(path: str | None = None, **options: Any) -> FakeModel:
        models.append(FakeModel(path, **options))
        models[-1].tokenizer.most_bytes = lambda n_tokens: 2000 * n_tokens
        return models[-1]

    monkeypatch.setitem(edge.__dict__, "load", load)
    return models


@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize(
    "args", [["complete", "-f", "FILE"], ["complete", "-"], ["complete"], ["chat"]]
)
def test_a_byte_order_mark_is_no_text(
    args: list[str], mark: bytes, loaded: list[FakeModel], tmp_path: Path
) -> None:
    for text in (TEXT, TEXT * 6000):  # one that is read before the model, one after
        (tmp_path / "FILE").write_bytes(mark + text.encode())
        path = [str(tmp_path / "FILE") if arg == "FILE" else arg for arg in args]
        result = run(*path, stdin=b"" if "FILE" in args else mark + text.encode())
        assert result.exit_code == 0, result.stderr
        ((prompt, _options),) = loaded[-1].sources[0].asked
        assert prompt == text.removesuffix("\n")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_utf16_is_named(encoding: str, loaded: list[FakeModel]) -> None:
    data = ("\ufeff" * (encoding == "utf-16-be") + TEXT).encode(encoding)
    for command in ("complete", "chat"):
        result = run(command, stdin=data)
        assert_one_line(result.exit_code, result.stderr, "standard input is UTF-16, not UTF-8")
    assert not loaded


def test_a_mark_alone_is_an_empty_prompt(loaded: list[FakeModel]) -> None:
    result = run("complete", "-", stdin=BOM)
    assert_one_line(result.exit_code, result.stderr, "the prompt is empty")


@pytest.mark.parametrize("args", [["complete", "-"], ["chat"]])
def test_no_more_is_read_than_fits(args: list[str], loaded: list[FakeModel]) -> None:
    result = run(*args, stdin=b"a" * 500_000)
    assert_one_line(result.exit_code, result.stderr, "more than 128000 bytes")
    assert not any(source.asked for model in loaded for source in model.sources)


class Counted(io.BytesIO):
    """Counts the bytes that were read."""

    count = 0

    def read(self, n: int | None = -1) -> bytes:
        data = super().read(n)
        self.count += len(data)
        return data


def test_reading_stops() -> None:
    file = Counted(b"a" * 10_000_000)
    text = TextFile(file, "x")
    assert file.count == 64 << 10 and not text.ended
    assert text.read(1_000_000) is None
    assert file.count < 1_100_000
    file = Counted(b"a" * 10_000_000)
    assert 1_000_000 <= len(TextFile(file, "x").start(1_000_000)) == file.count < 1_100_000


def test_characters_are_whole_wherever_pieces_end() -> None:
    for shift in range(4):
        data = b"a" * shift + "\U0001f600".encode() * 50_000
        assert TextFile(io.BytesIO(BOM + data), "x").read() == data.decode()


@pytest.mark.parametrize("offset", [0, 5, 65_535, 65_536, 100_000])
@pytest.mark.parametrize("mark", [b"", BOM])
def test_the_byte_that_is_wrong_is_named(offset: int, mark: bytes) -> None:
    data = mark + b"a" * offset + b"\xff" + b"a" * 100_000
    with pytest.raises(InputError, match=f"byte {len(mark) + offset} is 0xff"):
        TextFile(io.BytesIO(data), "x").read()


def test_half_a_character_at_the_end() -> None:
    for length in (10, 65_535, 65_536):
        with pytest.raises(InputError, match=f"byte {length} is 0xc3"):
            TextFile(io.BytesIO(b"a" * length + b"\xc3"), "x").read()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(InputError):
            TextFile.open(path)


@pytest.mark.native
def test_perplexity_reads_what_its_windows_need(tiny_gguf: Any, tmp_path: Path) -> None:
    model, path = str(tiny_gguf("llama")), tmp_path / "text"
    args = ["perplexity", model, "-f", str(path), "-c", str(MIN_CONTEXT), "--chunks", "2", "--json"]
    text = b"the world and a hello, " * 40
    found = []
    for data in (text, BOM + text, text * 4000):
        path.write_bytes(data)
        result = run(*args)
        assert result.exit_code == 0, result.stderr
        found.append(result.stdout.split('"n_tokens"')[0])
    assert found[0] == found[1] == found[2]
