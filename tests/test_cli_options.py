"""Options that several commands share: seeds, hints for what is misspelled, shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_model import ROOT, USAGE, FakeModel, FakeStream, run

import edge
from edge.errors import InputError
from edge.extras import EXTRAS, install
from edge.session.results import Completion


@pytest.mark.parametrize(
    ("args", "seed"),
    [
        (["chat"], None),
        (["chat", "--seed", "0"], 0),
        (["chat", "--seed", "-1"], None),
        (["complete"], 0),
        (["complete", "--seed", "-1"], None),
        (["complete", "--seed", str(2**64 - 1)], 2**64 - 1),
    ],
)
def test_chat_takes_another_seed_each_time(
    loaded: list[FakeModel], args: list[str], seed: int | None
) -> None:
    assert run(*args, "-p", "x").exit_code == 0
    assert loaded[0].sources[0].asked[0][1]["sampling"].seed == seed


@pytest.mark.parametrize("value", ["-2", "1.5", "x", str(2**64)])
def test_bad_seeds(loaded: list[FakeModel], value: str) -> None:
    result = run("chat", "-p", "x", "--seed", value)
    assert result.exit_code in (1, 2) and "seed" in result.stderr and not loaded


def test_the_seed_is_shown(loaded: list[FakeModel], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "seed" not in run("complete", "-p", "x").stderr
    done = Completion("x", (1,), "stop", USAGE, seed=77)
    monkeypatch.setattr(
        FakeStream, "completion", property(lambda self: done, lambda *_: None), False
    )
    assert run("complete", "-p", "x").stderr.endswith("2 threads; seed 77\n")
    assert json.loads(run("complete", "-p", "x", "--json").stdout)["seed"] == 77


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["chta"], "No such command 'chta'. Did you mean 'chat'?"),
        (["benhc"], "Did you mean 'bench'?"),
        (["model.gguf"], "To talk with that model: edge-run chat model.gguf"),
        (["qqqq"], "No such command 'qqqq'.\n"),
        (["chat", "--promt", "x"], "--prompt"),
        (["plan", "--memry", "1GB"], "--memory"),
    ],
)
def test_what_is_misspelled_gets_a_hint(args: list[str], hint: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and hint in result.stderr


def test_misspelled_options_of_the_api_get_a_hint() -> None:
    with pytest.raises(
        InputError, match=r"no option 'tresads': did you mean 'threads'\? There are"
    ):
        edge.load("no.gguf", tresads=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ("edge-run pe", "plain,perplexity"),
        ("edge-run plan --mem", "plain,--memory"),
        ("edge-run chat --top-", "plain,--top-k\nplain,--top-p"),
        ("edge-run info mod", "file,mod"),
    ],
)
def test_shells_complete(words: str, want: str) -> None:
    told = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    env = os.environ | told | {"_EDGE_RUN_COMPLETE": "bash_complete"}
    command = [sys.executable, "-m", "edge.cli"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == want


def test_extras_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(ROOT) / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {name: tuple(extras[name]) for name in EXTRAS} == EXTRAS
    assert install("qnn") == 'pip install "onnxruntime>=1.24.2" "onnxruntime-qnn>=2.7"'


def test_no_message_asks_for_a_package_that_no_index_has() -> None:
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "edge").rglob("*.py")]
    files += [f for f in (ROOT / "examples").rglob("*.*") if f.suffix in (".md", ".py", ".sh")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert "edge-run[" not in text and "pip install edge-run" not in text, path
