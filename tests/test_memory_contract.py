"""The memory contract, on whole processes: what was stated is never exceeded, and nothing dies.

Each run is an `edge-run complete` of its own, whose prompt fills the context; it writes the most
memory that it ever had resident (VmHWM) to a file when it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ggufbytes
import pytest
from fake_model import ROOT, assert_one_line

from edge.device import memory
from edge.files.gguf import GGUF
from edge.sizes import parse_size

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")

MIB = 1 << 20

#: The peak on its way out, then the program.
_MAIN = """
import atexit, os, sys
def write():
    with open("/proc/self/status") as status, open(os.environ["PEAK"], "w") as out:
        out.write(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
atexit.register(write)
from edge.cli import main
main()
"""


@dataclass
class Run:
    """How a process ended. peak: bytes, 0 when it could not say."""

    code: int
    stdout: bytes
    stderr: bytes
    peak: int

    @property
    def answered(self) -> bool:
        """Whether there is an answer; else there is one line that says why."""
        if self.code == 0:
            return True
        assert_one_line(self.code, self.stderr)
        return False


def complete(
    folder: Path, model: Path, *args: str, n_prompt: int, before: str = "", cache: str = "0"
) -> Run:
    """Run `edge-run complete` with a prompt of n_prompt tokens. before: shell commands; cache:
    EDGE_CACHE_SIZE, of a cache in the folder.
    """
    (folder / "prompt").write_text(" a" * n_prompt)  # a token each
    command = ["complete", str(model), "-f", str(folder / "prompt")]
    command += ["-n", "4", "--top-k", "0", "--top-p", "0.999", *args]
    return edge_run(folder, *command, before=before, cache=cache)


def edge_run(folder: Path, *args: str | Path, before: str = "", cache: str = "0") -> Run:
    """Run `edge-run` with these arguments."""
    (folder / "peak").write_text("0")
    command = [sys.executable, "-c", _MAIN, *map(str, args)]
    result = subprocess.run(
        ["/bin/sh", "-c", f'{before}\nexec "$@"', "sh", *command],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        env=os.environ
        | {"PEAK": str(folder / "peak"), "EDGE_CACHE": str(folder), "EDGE_CACHE_SIZE": cache},
    )
    peak = int((folder / "peak").read_text() or "0") * 1024
    return Run(result.returncode, result.stdout, result.stderr, peak)


def needed(folder: Path, model: Path, *args: str) -> int:
    """Bytes that the ledger asks for, as the refusal of a small budget tells them."""
    run = complete(folder, model, "--memory", "1MiB", *args, n_prompt=8)
    assert not run.answered
    match = re.search(rb"needs ([0-9.]+ [MG]iB)", run.stderr)
    assert match, run.stderr
    # rounding, and how many pages of its libraries a process finds in memory
    return parse_size(match[1].decode()) + 4 * MIB


def small(tiny_gguf: Callable[..., Path]) -> tuple[Path, int]:
    return tiny_gguf("llama"), 256


def with_much_cache(tiny_gguf: Callable[..., Path]) -> tuple[Path, int]:
    """50 MiB of keys and values."""
    return tiny_gguf("llama", context=1600, n_heads=16, n_kv_heads=16, head_dim=256), 1600


def with_heavy_weights(tiny_gguf: Callable[..., Path]) -> tuple[Path, int]:
    """50 MiB of weights, most of it one matrix, and a large vocabulary."""
    model = tiny_gguf("phi3", type="Q8_0", n_layers=1, dim=1024, ffn=4096, vocab=32000)
    return model, 256


MODELS = [small, with_much_cache, with_heavy_weights]


@pytest.mark.parametrize("make", MODELS)
def test_peak_is_within_the_budget(
    tiny_gguf: Callable[..., Path], tmp_path: Path, make: Callable[..., tuple[Path, int]]
) -> None:
    model, context = make(tiny_gguf)
    least, peaks = needed(tmp_path, model), []
    for budget, cache in ((least, "0"), (least, "1GB"), (least, "1GB"), (2 * least, "0")):
        args = ("--memory", str(budget))
        run = complete(tmp_path, model, *args, n_prompt=context - 4, cache=cache)
        assert run.answered, run.stderr
        assert 0 < run.peak <= budget
        peaks.append(run.peak)
    assert least <= 1.7 * max(peaks)  # nor is much asked for that is never used


def test_a_smaller_context_and_type_fit_a_smaller_budget(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    model, context = with_much_cache(tiny_gguf)
    budget = needed(tmp_path, model) - 8 * MIB
    refused = complete(tmp_path, model, "--memory", str(budget), n_prompt=8)
    assert not refused.answered
    options = re.findall(rb"(--[a-z]+ [^(]+) \(([0-9.]+ MiB)\)", refused.stderr)
    assert options
    for flags, size in options:
        assert parse_size(size.decode()) <= budget + MIB // 10
        args = flags.decode().split()
        n = int(args[1]) if args[0] == "--context" else context
        run = complete(tmp_path, model, "--memory", str(budget), *args, n_prompt=n - 4)
        assert run.answered, run.stderr
        assert 0 < run.peak <= budget


@pytest.mark.parametrize("value", ["0", "-1", "2GG", "", "0B", "nan"])
def test_bad_budget(tiny_gguf: Callable[..., Path], tmp_path: Path, value: str) -> None:
    run = complete(tmp_path, tiny_gguf("llama"), "--memory", value, n_prompt=8)
    assert_one_line(run.code, run.stderr, "memory")


def test_budget_beyond_the_machine(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    run = complete(tmp_path, tiny_gguf("llama"), "--memory", "900TB", n_prompt=8)
    assert_one_line(run.code, run.stderr, "more than the machine has")


@pytest.mark.parametrize("share", [1, 2, 4, 8])
def test_address_space_at_the_budget(
    tiny_gguf: Callable[..., Path], tmp_path: Path, share: float
) -> None:
    model, context = with_much_cache(tiny_gguf)
    budget = int(share * needed(tmp_path, model))
    limit = f"ulimit -v {budget // 1024}"
    for args in ((), ("--memory", str(budget))):
        run = complete(tmp_path, model, *args, n_prompt=context - 4, before=limit, cache="1GB")
        assert run.answered or run.stdout == b""
        assert run.peak <= budget


# ---- text, templates and vocabularies ---------------------------------------------------------

#: What a stranger gives -> arguments, and what the refusal says. TEXT: a file of 3 MB.
LONG: dict[str, tuple[list[str], str]] = {
    "file": (["complete", "MODEL", "-f", "TEXT"], "more than"),
    "perplexity": (["perplexity", "MODEL", "-f", "TEXT", "-c", "64"], "of text that the memory"),
    "template": (["chat", "MODEL", "-p", "Hi"], "at least"),
    "values": (["chat", "MODEL", "-p", "Hi"], "MiB"),
    "compiling": (["chat", "MODEL", "-p", "Hi"], "needs"),
}
TEMPLATES = {
    "template": "{{ 'ab 12, ' * 57000 }}",
    "values": "{% set a = 'b' * 10000000 %}" * 6,
    "compiling": "{{ [" + "a," * 24000 + "] }}",
}


@pytest.mark.parametrize("name", LONG)
def test_what_is_long_is_refused_within_the_budget(
    tiny_gguf: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model, (args, reason) = tiny_gguf("llama"), LONG[name]
    budget = needed(tmp_path, model)
    if name in TEMPLATES:
        model = with_strings(model, tmp_path, {"tokenizer.chat_template": TEMPLATES[name]})
    (tmp_path / "text").write_text("ab 12, the world\n" * 180_000)
    paths = {"MODEL": model, "TEXT": tmp_path / "text"}
    memory = ("--memory", str(budget))
    run = edge_run(tmp_path, *(paths.get(arg, arg) for arg in args), *memory)
    assert not run.answered
    assert_one_line(run.code, run.stderr, reason)
    assert 0 < run.peak <= budget


@pytest.mark.parametrize("name", ["long tokens", "merges", "tokens", "control tokens"])
def test_vocabularies_are_planned_by_their_arrays(
    tiny_gguf: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """As long a vocabulary as the embedding, but with much in it."""
    model = tiny_gguf("llama")
    budget = needed(tmp_path, model) + 24 * MIB
    with GGUF.open(model) as gguf:
        tokens, types, merges = (
            list(gguf.metadata[f"tokenizer.ggml.{key}"])
            for key in ("tokens", "token_type", "merges")
        )
    if name == "long tokens":
        tokens[276:284] = [f"{i}" * (2 << 20) for i in range(8)]
    elif name == "merges":
        merges *= 20_000
    elif name == "tokens":
        tokens += [f"<{i}>" for i in range(300_000)]
        types += [1] * 300_000
    else:
        tokens[276:284], types[276:284] = [f"{i}" * 5000 for i in range(8)], [3] * 8
    changed = {"tokens": tokens, "token_type": types, "merges": merges}
    model = with_strings(model, tmp_path, {f"tokenizer.ggml.{k}": v for k, v in changed.items()})
    run = complete(tmp_path, model, "--memory", str(budget), n_prompt=8)
    assert not run.answered
    assert 0 < run.peak <= budget


def with_strings(model: Path, folder: Path, changed: dict[str, Any]) -> Path:
    """A copy of a model with other values of some keys: texts, lists of texts or of numbers."""
    with GGUF.open(model) as gguf:
        raw = model.read_bytes()
        start = len(gguf.headers()[0])
        entries = []
        for name in gguf.metadata:
            new = changed.get(name)
            if new is None:
                entries.append(raw[slice(*gguf.metadata.span(name))])
            elif isinstance(new, str):
                entries.append(ggufbytes.key(name, ggufbytes.STRING, new))
            else:
                kind = ggufbytes.STRING if isinstance(new[0], str) else ggufbytes.I32
                entries.append(ggufbytes.key(name, ggufbytes.ARRAY, (kind, new)))
        end = max(gguf.metadata.span(name)[1] for name in gguf.metadata)
        infos = sum(24 + len(t.name) + 8 * len(t.shape) for t in gguf.tensors.values())
        head = ggufbytes.header(len(gguf.tensors), len(entries), gguf.version)
        head += b"".join(entries) + raw[end : end + infos]
    copy = folder / "changed.gguf"
    copy.write_bytes(head + bytes(-len(head) % 32) + raw[start:])
    return copy


@pytest.mark.parametrize("share", [1, 2, 4])
def test_data_at_the_budget(tiny_gguf: Callable[..., Path], tmp_path: Path, share: int) -> None:
    """RLIMIT_DATA counts all private memory that can be written."""
    model, context = with_much_cache(tiny_gguf)
    budget = share * needed(tmp_path, model)
    limit = f"ulimit -d {budget // 1024}"
    run = complete(tmp_path, model, n_prompt=context - 4, before=limit)
    assert run.answered or b"there is" in run.stderr
    assert run.answered == (share > 1)
    assert run.peak <= budget


MAPS = """\
00010000-00011000 r-xp 00000000 08:02 1 /usr/bin/python3.11
b0000000-b0100000 rw-p 00000000 00:00 0
befdf000-bf000000 rw-p 00000000 00:00 0 [stack]
ffff0000-ffff1000 r-xp 00000000 00:00 0 [vectors]
"""


def test_addresses_of_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    used = 0x1000 + 0x100000 + 0x21000
    assert memory._addresses_of_32_bits(str(maps)) == 0xBF000000 - used
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)  # no more than one piece may have
    assert memory._addresses_of_32_bits(str(maps)) == (1 << 31) - 1
    assert memory._addresses_of_32_bits(str(tmp_path / "none")) == 1 << 30
    with pytest.raises(MemoryError, match=r"2\.00 GiB in one piece"):
        memory.anonymous(1 << 31)


def test_32_bits_are_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_POINTER_BYTES", 4)
    monkeypatch.setattr(memory, "_addresses_of_32_bits", lambda: 500 << 20)
    there = memory.available()
    assert there is not None and there <= 340 << 20


# ---- control groups --------------------------------------------------------------------------


@contextlib.contextmanager
def control_group(n_bytes: int) -> Iterator[Path]:
    """A group with a limit on its memory. Skips the test where the system gives none."""
    root, name = Path("/sys/fs/cgroup"), "memory.max"
    if (root / "memory").is_dir():
        root, name = root / "memory", "memory.limit_in_bytes"
    group = root / f"edge-test-{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as e:
        pytest.skip(f"no control group can be made: {e}")
    try:
        try:
            (group / name).write_text(str(n_bytes))
        except OSError as e:
            pytest.skip(f"no limit can be set: {e}")
        yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize("share", [0.8, 1, 1.2, 2])
def test_control_group_at_the_budget(
    tiny_gguf: Callable[..., Path], tmp_path: Path, share: float
) -> None:
    model, context = with_much_cache(tiny_gguf)
    budget = int(share * needed(tmp_path, model))
    answers = []
    with control_group(budget) as group:
        enter = f"echo $$ > {group}/cgroup.procs"
        for args in ((), ("--memory", str(budget)), ("--memory", str(budget * 9 // 10))):
            run = complete(tmp_path, model, *args, n_prompt=context - 4, before=enter, cache="1GB")
            answers.append(run.answered)
            assert run.peak <= budget
    assert answers[0] == (share >= 1.2) or share == 1


# ---- a real model ----------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize("context", [64, 512, 4096])
def test_default_model_is_within_the_budget(smollm2: Path, tmp_path: Path, context: int) -> None:
    flags = ("--context", str(context))
    least = needed(tmp_path, smollm2, *flags)
    runs = ((least, "0"), (least, "1GB"), (least, "1GB"), (4 * least, "1GB"))
    for budget, cache in runs if context < 4096 else runs[:1]:  # a long prompt takes its time
        args = ("--memory", str(budget), *flags)
        run = complete(tmp_path, smollm2, *args, n_prompt=context - 4, cache=cache)
        assert run.answered, run.stderr
        assert 0 < run.peak <= budget
    assert least <= 1.2 * run.peak


@pytest.mark.model
def test_default_model_under_limits(smollm2: Path, tmp_path: Path) -> None:
    budget = needed(tmp_path, smollm2) * 5 // 4
    for share in (1, 2, 4):
        limit = f"ulimit -v {share * budget // 1024}"
        run = complete(tmp_path, smollm2, n_prompt=1000, before=limit, cache="1GB")
        assert run.answered or run.stdout == b""
    with control_group(budget) as group:
        enter = f"echo $$ > {group}/cgroup.procs"
        for _ in range(2):  # what the first run leaves in the system's cache is no hindrance
            run = complete(tmp_path, smollm2, n_prompt=1000, before=enter, cache="1GB")
            assert run.answered and run.peak <= budget
