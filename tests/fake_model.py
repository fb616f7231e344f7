"""A model without weights, and `edge-run` run by a test."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from click.testing import CliRunner, Result

from edge.cli import cli
from edge.errors import EdgeError
from edge.session.results import Completion, Piece, TokenLogprob, Usage

ROOT = Path(__file__).parent.parent

USAGE = Usage(
    prompt_tokens=5, completion_tokens=3, prompt_seconds=0.5, decode_seconds=0.25, decode_steps=2
)


class FakeStream:
    """Says the words one by one; `completion` is there at the end, as with a real one."""

    def __init__(self, source: FakeSource, options: dict[str, Any]) -> None:
        self.source, self.options, self.usage = source, options, USAGE

    def cancel(self) -> None:
        self.source.cancel()

    def __iter__(self) -> Iterator[Piece]:
        said, reason = [], "stop"
        for i, word in enumerate(self.source.words):
            if self.source.cancelled:
                reason = "cancelled"
                break
            time.sleep(self.source.pause)
            said.append(Piece(word, i, -0.5, (TokenLogprob(i, -0.5), TokenLogprob(9, -2.0))))
            yield said[-1]
        self.completion = Completion(
            "".join(p.text for p in said),
            tuple(range(len(said))),
            reason,
            USAGE,
            tuple(said) if self.options["logprobs"] else (),
        )


class FakeSource:
    """A session and a chat: notes what it was asked."""

    words: tuple[str, ...] = ("One", " two", " drei ü")
    pause = 0.0
    error: EdgeError | None = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.messages: list[dict[str, Any]] = []
        self.cancelled = False

    def stream(self, prompt: str, **options: Any) -> FakeStream:
        self.cancelled = False
        self.asked.append((prompt, {"logprobs": 0} | options))
        if self.error is not None:
            raise self.error
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant"}]
        return FakeStream(self, self.asked[-1][1])

    def cancel(self) -> None:
        self.cancelled = True

    def reset(self) -> None:
        self.messages.clear()


class FakeModel:
    """What edge.load gives, with how it was called."""

    def __init__(self, path: str | None = None, **options: Any) -> None:
        self.path, self.options = path, options
        self.engine = SimpleNamespace(
            isa="avx2", threads=2, refused=None, config=SimpleNamespace(n_context=64)
        )
        self.tokenizer = SimpleNamespace(token_text=lambda token: f"<{token}>")
        self.sources: list[FakeSource] = []
        self.system: str | None = None

    def info(self) -> dict[str, Any]:
        facts = {"name": "Fake", "path": "models/m.gguf", "architecture": "llama"}
        types = {"F32": 9, "Q4_0": 5, "Q6_K": 1}
        sizes = {"parameters": 3_800_000_000, "file_bytes": 5 << 20, "context": 4096}
        return {**facts, **sizes, "types": types}

    def close(self) -> None:
        pass

    def session(self, when_full: str = "stop") -> FakeSource:
        self.when_full = when_full
        self.sources.append(FakeSource())
        return self.sources[-1]

    def chat(
        self, system: str | None = None, when_full: str = "stop", variables: Any = None
    ) -> FakeSource:
        self.system, self.variables = system, variables
        return self.session(when_full)

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def run(*args: str, stdin: bytes | str | None = None) -> Result:
    """The program in this process; standard input is never a terminal here."""
    try:
        runner = CliRunner(mix_stderr=False)  # type: ignore[call-arg]
    except TypeError:  # click 8.2 never mixes
        runner = CliRunner()
    return runner.invoke(cli, args, input=stdin)


def edge_run(
    *args: str | Path, stdin: bytes = b"", code: str = "", **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """The program in a process of its own. code: Python that runs first."""
    program = f"import sys; {code}\nfrom edge.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(
        command, input=stdin, capture_output=True, timeout=60, cwd=ROOT, check=False, **options
    )


def assert_one_line(code: int, stderr: str | bytes, match: str = "") -> None:
    """Exit code 1 and one line that says what is wrong."""
    text = stderr.decode() if isinstance(stderr, bytes) else stderr
    assert "Traceback" not in text
    assert text.startswith("edge-run: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert "a bug of ours" not in text
    assert match.lower() in text.lower()
    assert code == 1
