"""The kiosk of the examples: its visitors, who may use it, its answers, and its service unit."""

from __future__ import annotations

import configparser
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from kiosks import FOLDER, ROOT, VISITOR, running

import edge
from edge.sizes import parse_size

UNIT = FOLDER / "edge-kiosk.service"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """kiosk.py."""
    spec = importlib.util.spec_from_file_location("kiosk", FOLDER / "kiosk.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_path(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf(context=4096, head_dim=32)


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[edge.Model]:
    with edge.load(model_path, context=1024, threads=1, sessions=2) as model:
        yield model


@pytest.fixture
def kiosk(module: ModuleType, model: edge.Model, tmp_path: Path) -> Iterator[Any]:
    """For two visitors at a time."""
    facts = module.Facts("A ticket costs 8 euros. (price)\nThe lift is behind the door.")
    kiosk = module.Kiosk(model, tmp_path, facts, 2)
    yield kiosk
    kiosk.close()


A, B, C = ("a" * 32, "b" * 32, "c" * 32)


def answer(kiosk: Any, name: str, question: str = "Hello") -> Any:
    """The events of an answer, as they come, as the server asks for them."""
    visitor = kiosk.visitor(name)
    with visitor.lock:
        yield from kiosk.ask(visitor, question)


# ---- visitors ----


def test_each_visitor_has_a_conversation(kiosk: Any) -> None:
    """The second one is answered while the first one's answer is under way."""
    first = answer(kiosk, A)
    assert next(first)["text"]
    assert list(answer(kiosk, B, "Who?"))[-1]["end"] in ("stop", "length")
    assert list(first)[-1]["end"] in ("stop", "length")
    asked = [[m["content"] for m in v.chat.messages] for v in kiosk.visitors.values()]
    assert ["Hello" in str(asked[0]), "Who?" in str(asked[0])] == [True, False]
    assert ["Hello" in str(asked[1]), "Who?" in str(asked[1])] == [False, True]


def test_who_was_away_for_longest_makes_room(kiosk: Any, tmp_path: Path) -> None:
    for name in (A, B, A, C):
        list(answer(kiosk, name))
    assert set(kiosk.visitors) == {A, C}
    assert {file.stem for file in tmp_path.glob("*.session")} == {A, C}


def test_who_is_being_answered_does_not(kiosk: Any) -> None:
    answers = [answer(kiosk, A), answer(kiosk, B)]
    for one in answers:
        next(one)
    assert kiosk.visitor(C) is None
    list(answers[1])
    assert kiosk.visitor(C) is not None and set(kiosk.visitors) == {A, C}
    assert list(answers[0])[-1]["end"] in ("stop", "length")


def test_who_is_away_is_forgotten(kiosk: Any, tmp_path: Path) -> None:
    for name in (A, B):
        list(answer(kiosk, name))
    kiosk.forget_idle()
    assert set(kiosk.visitors) == {A, B}
    kiosk.visitors[A].seen -= 10_000
    kiosk.forget_idle()
    assert set(kiosk.visitors) == {B} == {file.stem for file in tmp_path.glob("*.session")}


def test_what_is_old_is_forgotten_at_start(
    module: ModuleType, model: edge.Model, tmp_path: Path
) -> None:
    for name, age in ((A, 10_000), (B, 0)):
        (tmp_path / f"{name}.session").touch()
        os.utime(tmp_path / f"{name}.session", (time.time() - age,) * 2)
    module.Kiosk(model, tmp_path, module.Facts(""), 2)
    assert [file.stem for file in tmp_path.glob("*.session")] == [B]


def test_stop_ends_the_answer(kiosk: Any) -> None:
    events = answer(kiosk, A)
    assert next(events)["text"]
    kiosk.stop(A)
    assert list(events)[-1]["end"] == "cancelled"
    assert list(answer(kiosk, A))[-1]["end"] in ("stop", "length")


def test_a_conversation_that_is_too_long_begins_anew(kiosk: Any) -> None:
    for _ in range(12):
        assert list(answer(kiosk, A, "Hello " * 30))[-1]["end"] in ("stop", "length", "context")
    assert len(kiosk.visitors[A].chat.messages) < 1 + 4 + 2 * 12


# ---- the service ----


@linux
def test_conversation_goes_on_in_the_next_process(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "state" / f"{VISITOR}.session"
    with running(tmp_path, model_path) as service:
        status, page = service.get("")
        assert status == 200 and "<form>" in page
        assert service.ask("Hello")["end"] in ("stop", "length")
    size = file.stat().st_size
    assert b"Hello" in file.read_bytes()
    assert [path.stat().st_mode & 0o77 for path in (file, file.parent)] == [0, 0]
    with running(tmp_path, model_path) as service:
        assert service.get("ask", b"\xff\xfe")[0] == 200
        assert file.stat().st_size > size and b"Hello" in file.read_bytes()
        assert service.get("new", b"")[0] == 204 and not file.exists()
    file.write_bytes(b"damaged")
    with running(tmp_path, model_path) as service:
        assert service.ask("Hello")["end"] in ("stop", "length")


@linux
def test_only_its_own_page_may_use_it(model_path: Path, tmp_path: Path) -> None:
    with running(tmp_path, model_path) as service:
        port = service.url.rstrip("/").rpartition(":")[2]
        for what, data, headers, status in (
            ("nothing", None, {}, 404),
            ("", None, {"Host": "evil.example"}, 403),
            ("", None, {"Host": f"evil.example:{port}"}, 403),
            ("", None, {"Host": f"localhost:{port}"}, 200),
            ("ask", b" ", {}, 400),
            ("ask", b"x" * 5000, {}, 413),
            ("nothing", b"", {}, 404),
            ("ask", b"Hello", {"X-Visitor": "../../etc/passwd"}, 400),
            ("ask", b"Hello", {"X-Visitor": ""}, 400),
            ("ask", b"Hello", {"Origin": "http://evil.example"}, 403),
            ("ask", b"Hello", {"Origin": "null"}, 403),
            ("ask", b"Hello", {"Origin": ""}, 403),
            ("ask", b"Hello", {"Origin": f"http://localhost:{port}"}, 403),
            ("ask", b"Hello", {"Host": f"evil.example:{port}"}, 403),
            ("stop", b"", {}, 204),
        ):
            assert service.get(what, data, **headers)[0] == status, (what, data, headers)
        assert not list((tmp_path / "state").iterdir())


# ---- answers ----


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("How much is a ticket?", "8 euros"),
        ("What do kids pay?", "nothing for children"),
        ("Are you open on Monday?", "closed on Mondays"),
        ("When do you close?", "10:00 to 18:00"),
        ("I need a restroom", "toilets are on the ground floor"),
        ("WHERE IS THE ELEVATOR", "lift behind the café"),
    ],
)
def test_facts_are_found_by_their_words(module: ModuleType, question: str, fact: str) -> None:
    facts = module.Facts((FOLDER / "facts.txt").read_text(encoding="utf-8"))
    found = " ".join(facts.about(question))
    assert fact in found and "(" not in found
    assert facts.about("Do you have parking?") == [] == facts.about("?")


@linux
@pytest.mark.model
def test_the_default_model_answers_right(tmp_path: Path) -> None:
    """What a visitor asks most. It says what it was told, in one sentence, and stops."""
    with running(tmp_path) as service:
        for question, right in (
            ("How much is a ticket?", "8 euros"),
            ("What do children pay?", "nothing for children"),
            ("When are you open?", "10:00 to 18:00"),
            ("Where are the toilets?", "ground floor"),
            ("Where can I get a coffee?", "ground floor"),
            ("Is there a lift?", "behind the café"),
            ("Where can I see pocket watches?", "first floor"),
            ("When is the demonstration?", "15:00"),
            ("What is on the second floor?", "workshop"),
            ("Do you have parking?", "staff at the entrance"),
        ):
            service.get("new", b"")
            done = service.ask(question)
            assert right in done["text"] and done["end"] == "stop", (question, done)


# ---- the unit ------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="ascii"))
    return parser


def test_unit_runs_the_kiosk() -> None:
    service = unit()["Service"]
    python, script, _model, *flags = shlex.split(service["ExecStart"])
    assert (Path(python).name, Path(script).name) == ("python", "kiosk.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    usage = subprocess.run(
        [sys.executable, str(FOLDER / "kiosk.py"), "--help"],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    ).stdout
    assert all(flag in usage for flag in flags if flag.startswith("--"))
    memory, most = parse_size(flags[flags.index("--memory") + 1]), parse_size(service["MemoryMax"])
    assert memory < most < 1.5 * memory
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert " ".join(flags) in readme  # the plan that is shown is of what runs


def test_unit_is_locked_up() -> None:
    service = unit()["Service"]
    for name in ("DynamicUser", "ProtectHome", "NoNewPrivileges", "RestrictNamespaces"):
        assert service[name] == "yes"
    assert (service["ProtectSystem"], service["Restart"]) == ("strict", "on-failure")
    assert "ProcSubset" not in service  # what memory there is, is read from /proc


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="ascii").replace("/opt/edge/venv/bin/python", sys.executable)
    (tmp_path / UNIT.name).write_text(text, encoding="ascii")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, [])
