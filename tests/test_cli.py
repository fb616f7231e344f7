"""`edge-run` on a fake model: options, output, exit codes, one line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from fake_model import ROOT, USAGE, FakeModel, assert_one_line, run

import edge
from edge.cli import COMMANDS, cli
from edge.cli.terminal import figures
from edge.disk import pull
from edge.errors import InputError, ModelFileError

# ---- the program ----


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name, line in COMMANDS.items():
        assert name in result.output and line in result.output
        command = cli.get_command(click.Context(cli), name)
        assert command is not None and command.help is not None
        assert command.help.splitlines()[0] == line


def test_version() -> None:
    assert run("--version").output == f"edge-run {edge.__version__}\n"


def test_start_imports_nothing_heavy() -> None:
    code = "import sys; import edge.cli; edge.cli.cli.main(['--help'], standalone_mode=False)"
    heavy = "{'numpy', 'rich', 'jinja2', 'tokenizers', 'cffi', 'edge.session.session'}"
    check = f"import atexit; atexit.register(lambda: print({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {check}; {code}"], cwd=ROOT, capture_output=True
    )
    assert done.stdout.endswith(b"set()\n")


@pytest.mark.parametrize(
    "args",
    [
        ["nothing"],
        ["chat", "--nothing"],
        ["chat", "m.gguf", "-p", "x", "--context", "0"],
        ["chat", "m.gguf", "-p", "x", "--temperature", "-1"],
        ["chat", "m.gguf", "-p", "x", "--logit-bias", "5"],
        ["complete", "m.gguf", "-p", "x", "--file", "y"],
        ["complete", "m.gguf", "-p", "x", "--logprobs", "2"],
        ["complete", "m.gguf", "other"],
        ["bench", "--threads", "1,no"],
        ["bench", "--prompt", "0", "--decode", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(args: list[str], loaded: list[FakeModel]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert not loaded


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("no\nsuch \x1b[31mthing"), "edge-run: no such ?[31mthing\n"),
        (ModelFileError("is bad", path="m.gguf", offset=7), "edge-run: m.gguf at byte 7: is bad\n"),
        (MemoryError(), "edge-run: out of memory\n"),
        (RuntimeError("can't start new thread"), "edge-run: out of memory\n"),
        (PermissionError(13, "Permission denied", "x"), "edge-run: x: Permission denied\n"),
        (ImportError("no libx.so"), "edge-run: a part of edge cannot be loaded: no libx.so\n"),
        (
            ZeroDivisionError("x"),
            "edge-run: a bug of ours, please report it: ZeroDivisionError: x\n",
        ),
    ],
)
def test_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, line: str) -> None:
    def load(path: str | None, **options: Any) -> FakeModel:
        raise error

    monkeypatch.setitem(edge.__dict__, "load", load)
    result = run("chat", "m.gguf", "-p", "hello")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


def test_ctrl_c_while_loading_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str | None, **options: Any) -> FakeModel:
        raise KeyboardInterrupt

    monkeypatch.setitem(edge.__dict__, "load", load)
    result = run("chat", "m.gguf", "-p", "hello")
    assert (result.exit_code, result.stderr.strip()) == (130, "")


# ---- chat and complete, on a fake ----


@pytest.mark.parametrize("args", [["-p", "Why?"], []], ids=["option", "pipe"])
def test_chat_answers_once(loaded: list[FakeModel], args: list[str]) -> None:
    result = run("chat", "m.gguf", *args, "--system", "Be short.", stdin="Why?\n")
    assert (result.exit_code, result.stdout) == (0, "One two drei ü\n")
    (model,) = loaded
    assert (model.path, model.system) == ("m.gguf", "Be short.")
    assert [question for question, _ in model.sources[0].asked] == ["Why?"]


def test_figures_after_the_answer(loaded: list[FakeModel]) -> None:
    result = run("chat", "-p", "Why?")
    (line,) = result.stderr.splitlines()
    for part in ("prompt 5 tokens, 10.0/s", "answer 3 tokens, 8.0/s", "avx2, 2 threads", "MiB"):
        assert part in line
    assert run("chat", "-q", "-p", "Why?").stderr == ""
    loaded[-1].engine.refused = "Operation not permitted"
    line = figures(USAGE, loaded[-1].engine)
    assert line.endswith("2 threads (not kept on the fast cores: Operation not permitted)")


def test_figures_on_an_old_cpu(loaded: list[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.native.isas", lambda: ["avx2"])
    (line,) = run("chat", "-p", "Why?").stderr.splitlines()
    assert "(there are no faster ones for this CPU), 2 threads" in line


def test_flags_reach_the_model(loaded: list[FakeModel]) -> None:
    flags = "--context 32 --threads 3 --max-tokens 7 --temperature 0 --seed 5 --top-k 1"
    bias = "--logit-bias 4=-1.5 --logit-bias 5=-inf"
    assert run("chat", "-p", "Why?", *flags.split(), *bias.split()).exit_code == 0
    model = loaded[0]
    assert model.path is None
    assert (model.options["context"], model.options["threads"]) == (32, 3)
    options = model.sources[0].asked[0][1]
    assert options["max_tokens"] == 7
    assert options["sampling"] == edge.SamplingOptions(
        temperature=0, seed=5, top_k=1, logit_bias={4: -1.5, 5: float("-inf")}
    )


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_flags_of_memory_reach_the_model(loaded: list[FakeModel], command: str) -> None:
    flags = "--memory 1GB --kv q8 --when-full slide --prefix-cache pages"
    assert run(command, "-p", "Why?", *flags.split()).exit_code == 0
    assert run(command, "-p", "Why?").exit_code == 0
    told, plain = loaded
    options = {"memory": "1GB", "kv": "q8", "prefix_cache": "pages"}
    assert told.options.items() >= options.items() and told.when_full == "slide"
    assert plain.options["memory"] is None and plain.when_full == "stop"


def test_flags_of_templates_reach_the_model(loaded: list[FakeModel]) -> None:
    flags = ["--chat-template", "rag", "--template-var", "enable_thinking=false"]
    flags += ["--template-var", 'effort="high"', "--no-model-sampling"]
    assert run("chat", "-p", "Why?", *flags).exit_code == 0
    assert run("chat", "-p", "Why?").exit_code == 0
    told, plain = loaded
    assert told.variables == {"enable_thinking": False, "effort": "high"} and not plain.variables
    for model, wanted in ((told, ("rag", False)), (plain, (None, True))):
        assert (model.options["chat_template"], model.options["model_sampling"]) == wanted
    result = run("chat", "-p", "Why?", "--template-var", "effort=high")
    assert result.exit_code == 2 and '"text" in double quotes' in result.stderr


def test_every_sampling_option_is_a_flag(loaded: list[FakeModel]) -> None:
    assert run("complete", "-p", "x").exit_code == 0
    assert loaded[0].sources[0].asked[0][1]["sampling"] == edge.SamplingOptions()


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        (["m.gguf", "-p", "Once ü"], ""),
        (["m.gguf", "-"], "Once ü\n"),
        (["-"], "Once ü\r\n"),
        ([], "Once ü"),
        (["--file", "FILE"], ""),
    ],
)
def test_complete_takes_text(
    loaded: list[FakeModel], tmp_path: Path, args: list[str], stdin: str
) -> None:
    (tmp_path / "FILE").write_text("Once ü\n", encoding="utf-8")
    args = [str(tmp_path / arg) if arg == "FILE" else arg for arg in args]
    result = run("complete", *args, stdin=stdin.encode())
    assert (result.exit_code, result.stdout) == (0, "One two drei ü")
    assert loaded[0].path == ("m.gguf" if "m.gguf" in args else None)
    assert loaded[0].sources[0].asked[0][0] == "Once ü"


def test_complete_json(loaded: list[FakeModel]) -> None:
    result = run("complete", "-p", "x", "--json", "--logprobs", "2", "--stop", "a", "--special")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["tokens"]) == ("One two drei ü", [0, 1, 2])
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["logprobs"][1] == {
        "token": 1,
        "text": "<1>",
        "logprob": -0.5,
        "top": [
            {"token": 1, "text": "<1>", "logprob": -0.5},
            {"token": 9, "text": "<9>", "logprob": -2.0},
        ],
    }
    options = loaded[0].sources[0].asked[0][1]
    assert (options["logprobs"], options["special"], options["stop"]) == (2, True, ("a",))


@pytest.mark.parametrize("command", ["chat", "complete"])
@pytest.mark.parametrize(
    ("args", "stdin", "match"),
    [
        (["-p", ""], b"", "the prompt is empty"),
        ([], b"", "the prompt is empty"),
        ([], b"\n", "the prompt is empty"),
        ([], b"good \xff bad", "standard input is not UTF-8: byte 5 is 0xff"),
        (["-p", "ab\udcfe"], b"", "the prompt is not UTF-8: byte 2 is 0xfe"),
    ],
)
def test_bad_prompt(
    loaded: list[FakeModel], command: str, args: list[str], stdin: bytes, match: str
) -> None:
    result = run(command, *args, stdin=stdin)
    assert_one_line(result.exit_code, result.stderr, match)
    assert not loaded


@pytest.mark.parametrize(
    ("content", "match"),
    [(b"a\xc3(", "byte 1 is 0xc3"), (b"", "empty"), (None, "no such file")],
)
def test_bad_file(
    loaded: list[FakeModel], tmp_path: Path, content: bytes | None, match: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    result = run("complete", "--file", str(tmp_path / "text"))
    assert_one_line(result.exit_code, result.stderr, match)


def test_missing_default_model_says_pull(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    for command in (["chat", "-p", "x"], ["complete", "-p", "x"], ["info"], ["bench"]):
        result = run(*command)
        assert_one_line(result.exit_code, result.stderr, "edge-run pull")


def test_pull(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched = iter((True, False))
    monkeypatch.setattr(pull, "pull", lambda **_: (tmp_path / "m.gguf", next(fetched)))
    assert run("pull").output == f"{pull.DEFAULT.name}: {tmp_path / 'm.gguf'}\n"
    assert run("pull").output.endswith("(already there)\n")
