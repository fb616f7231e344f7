"""`edge.bench` and `edge-run bench`: what is measured, rows and files, peers that fail."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import ROOT, edge_run, run

from edge.bench import Case, Peer, Report, Settings, measure, plot, rounds, runner
from edge.bench.ours import Ours, work
from edge.bench.report import roofs
from edge.device.machine import Machine, buffer_bytes, largest_cache
from edge.errors import ContextError, InputError, MemoryBudgetError, UnsupportedError
from edge.loading import KV_TYPES
from edge.native import lib

Tiny = Callable[..., Path]

#: Enough of llama-cpp-python's C API to be measured. It cannot load files that are not GGUF.
FAKE_PEER = """
import os
__version__ = "1.2"

class Params: pass
class Batch:
    def __init__(self, n):
        self.token, self.pos, self.logits, self.n_seq_id = ([0] * n for _ in range(4))
        self.seq_id, self.n_tokens = [[0] for _ in range(n)], 0

LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
told, length = [], [0]
def llama_log_callback(f): return f
def llama_log_set(f, _): told.append(f)
def llama_backend_init(): pass
def llama_model_default_params(): return Params()
def llama_context_default_params(): return Params()
def llama_model_load_from_file(path, params):
    if open(path, "rb").read(4) == b"GGUF": return 1
    told[0](4, b"load: noise\\n", None)
    told[0](4, b"error: no magic in it\\n", None)
def llama_init_from_model(model, params):
    kept = params.type_k, params.type_v, getattr(params, "flash_attn_type", -1)
    assert kept in {(1, 1, -1), (8, 8, 1), (2, 2, 1)}, kept
    return 1 if params.n_ctx >= 20 else None
def llama_model_get_vocab(model): return 1
def llama_vocab_n_tokens(vocab): return 100
def llama_batch_init(n, _, __): return Batch(n)
def llama_get_memory(context): return 1
def llama_memory_seq_rm(memory, sequence, first, end): length[0] = first
def llama_synchronize(context): pass
def llama_print_system_info(): return b"CPU : FAST = 1 | SLOW = 0 | "
def llama_decode(context, batch):
    n = batch.n_tokens
    assert batch.pos[:n] == list(range(length[0], length[0] + n)) and n <= 512
    assert batch.token[:n] == [(7 * i + 11) % 100 for i in batch.pos[:n]]
    length[0] += n
    return int(os.environ.get("FAKE_STATUS", "0"))
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama_cpp that this Python can import."""
    (tmp_path / "llama_cpp.py").write_text(FAKE_PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


class Fake:
    """A runtime that notes what it was given."""

    n_vocab, batch = 100, 8

    def __init__(self) -> None:
        self.length = 0
        self.given: list[tuple[int, int, bool]] = []  # start, tokens, last

    def cut(self, n_tokens: int, depth: int) -> int:
        self.length = min(self.length, n_tokens)
        return self.length

    def append(self, tokens: Sequence[int], start: int, last: bool) -> None:
        assert start == self.length
        assert list(tokens) == [(7 * (start + i) + 11) % 100 for i in range(len(tokens))]
        self.length += len(tokens)
        self.given.append((start, len(tokens), last))


# ---- steps ---------------------------------------------------------------------------------------


def test_a_prompt_runs_in_batches_and_wants_its_last_logits() -> None:
    fake = Fake()
    assert runner.seconds(fake, Case("prompt", 20)) > 0
    assert fake.given == [(0, 8, False), (8, 8, False), (16, 4, True)]


def test_decode_fills_the_depth_once_and_wants_all_logits() -> None:
    fake = Fake()
    runner.seconds(fake, Case("decode", 2, 10))
    assert fake.given == [(0, 8, False), (8, 2, False), (10, 1, True), (11, 1, True)]
    runner.seconds(fake, Case("decode", 2, 10))
    assert fake.given[4:] == [(10, 1, True), (11, 1, True)]


def test_speed_stops_when_it_has_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([1.0, 4.0, 2.0, 9.0])
    monkeypatch.setattr(runner, "seconds", lambda *_: next(taken))
    assert runner.speed(Fake(), Case("prompt", 8), enough=100, most=3) == 8 / 2.0
    assert runner.speed(Fake(), Case("prompt", 9), enough=5, most=3) == 1.0


def test_warm_up_is_short() -> None:
    fake = Fake()
    runner.warm_up(fake, [Case("prompt", 1000), Case("decode", 1000)])
    assert sum(n for _, n, _ in fake.given) == sum(runner.WARM_UP)


# ---- the machine ---------------------------------------------------------------------------------


@pytest.mark.native
def test_roofs_are_measured() -> None:
    with Machine(1) as machine:
        read, dot = machine.measure()
        undisturbed = machine.read()
    assert 1e7 < read < 1e13 and 1e6 < dot < 1e14 and 1e7 < undisturbed < 1e13
    machine.close()


@pytest.mark.native
def test_measuring_refuses_bad_arguments() -> None:
    with Machine(1) as m:
        from edge.native import ffi

        ns, macs = ffi.new("int64_t *"), ffi.new("int64_t *")
        assert lib.edge_measure_read(m._threads, m._base, 0, ns) == lib.EDGE_BAD_ARGUMENT
        assert lib.edge_measure_read(m._threads, ffi.NULL, 8, ns) == lib.EDGE_BAD_ARGUMENT
        assert lib.edge_measure_dot(m._threads, 99, macs, ns) == lib.EDGE_BAD_ARGUMENT
        assert lib.edge_measure_dot(ffi.NULL, 0, macs, ns) == lib.EDGE_BAD_ARGUMENT
        for n_bytes in (1, 255, 257, (1 << 18) + 3):  # no multiple of what is read at once
            assert lib.edge_measure_read(m._threads, m._base, n_bytes, ns) == lib.EDGE_OK


@pytest.mark.parametrize(("left", "want"), [(1 << 40, 256), (800 << 20, 200), (160 << 20, 64)])
def test_a_small_buffer_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, left: int, want: int
) -> None:
    monkeypatch.setattr("edge.device.machine.largest_cache", lambda: 32 << 20)
    monkeypatch.setattr("edge.device.machine.available", lambda: left)
    with Machine(1, small=True) as machine:
        assert len(machine._block) == want << 20
    monkeypatch.setattr("edge.device.machine.available", lambda: 100 << 20)
    with pytest.raises(MemoryBudgetError):
        Machine(1, small=True)


def test_no_memory_for_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.device.machine.available", lambda: 1 << 20)
    with pytest.raises(MemoryBudgetError, match="measure the bandwidth"):
        Machine(1)


def test_the_buffer_is_larger_than_the_caches(tmp_path: Path) -> None:
    for i, size in enumerate(["48K", "1M", "32M", "odd"]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert largest_cache(str(tmp_path)) == 32 << 20
    assert largest_cache(str(tmp_path / "none")) is None
    assert buffer_bytes(32 << 20) == 256 << 20
    assert buffer_bytes(None) == buffer_bytes(1 << 20) == 64 << 20
    assert buffer_bytes(1 << 30) == 1 << 30


# ---- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_work_of_a_token(tiny_gguf: Tiny, tied: bool) -> None:
    dim, ffn, kv, vocab = 64, 128, 32, 288
    layer = 2 * dim * dim + 2 * dim * kv + 3 * dim * ffn
    with Ours(tiny_gguf("llama", type="Q8_0", ffn=ffn, tied=tied), 1, 64) as ours:
        decode = work(ours.engine, Case("decode", 8, 16))
        prompt = work(ours.engine, Case("prompt", 10))
        assert decode.macs == 2 * layer + dim * vocab  # the embedding counts as the head only
        assert decode.bytes == pytest.approx(decode.macs * 34 / 32, rel=0.01)
        assert decode.cache_bytes == ours.engine.cache_bytes(20)
    # Of a prompt only the last token goes past the last attention.
    after = dim * dim + 3 * dim * ffn + dim * vocab
    assert prompt.macs == pytest.approx(2 * layer - (dim * dim + 3 * dim * ffn) + after / 10)
    assert prompt.bytes == pytest.approx(decode.bytes / 10)
    assert prompt.cache_bytes == 0


# ---- rounds and rows -----------------------------------------------------------------------------

CASES = (Case("prompt", 12), Case("decode", 3), Case("decode", 3, 20))


def test_alone(tiny_gguf: Tiny) -> None:
    path, said = str(tiny_gguf("llama")), []
    settings = Settings(CASES, (1, 2), rounds=2)
    report = Report(path, measure(path, settings, lambda *args: said.append(args)), settings)
    assert len(report.rows) == 6 and [m.threads for m in report.measured] == [1, 2]
    for row in report.rows:
        assert row["runtime"] == "edge" and len(row["tokens_per_second"]) == 2
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["bandwidth_share"] > 0 and row["peak_share"] > 0
    whole = json.loads(json.dumps(report.json()))
    assert [roof["threads"] for roof in whole["roofs"]] == [1, 2]
    assert whole["builds"]["edge"].startswith("edge ") and whole["isa"] == report.measured[0].isa
    assert {what for what, _, _ in said} >= {"measuring, threads 1", "measuring, threads 2"}


def test_figures_are_of_the_medians(tiny_gguf: Tiny) -> None:
    path = str(tiny_gguf("llama"))
    settings = Settings((Case("decode", 3),), (1,), rounds=1)
    report = Report(path, measure(path, settings), settings)
    (row,), (one,) = report.rows, report.measured
    gigabytes = row["median"] * one.work[0].bytes / 1e9
    assert row["gigabytes_per_second"] == pytest.approx(gigabytes)
    assert row["bandwidth_share"] == pytest.approx(gigabytes * 1e9 / roofs(one)["read"])
    assert row["macs_per_byte"] == pytest.approx(one.work[0].macs / one.work[0].bytes)


def test_beside_a_peer(tiny_gguf: Tiny, peer: None) -> None:
    path = str(tiny_gguf("llama"))
    settings = Settings(CASES, (1,), rounds=2, peers=(Peer("llama.cpp"),))
    report = Report(path, measure(path, settings), settings)
    assert [row["runtime"] for row in report.rows] == ["edge", "llama.cpp"] * 3
    ours, theirs = report.rows[:2]
    pairs = zip(ours["tokens_per_second"], theirs["tokens_per_second"], strict=True)
    assert theirs["ratios"] == [a / b for a, b in pairs]
    assert theirs["ratio_min"] <= theirs["ratio"] <= theirs["ratio_max"]
    assert report.builds()["llama.cpp"] == "llama_cpp 1.2: FAST"
    text = "\n".join(report.lines())
    assert "x as fast" in text and "llama_cpp 1.2" in text and "decode 3 at 20" in text


@pytest.mark.parametrize("kv", KV_TYPES)
def test_keys_and_values_of_a_type(
    tiny_gguf: Tiny, peer: None, monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """The peer gets the type (it checks which numbers), so does edge."""
    seen: list[dict[str, Any]] = []
    settings = Settings(CASES[1:2], (1,), rounds=1, peers=(Peer("llama.cpp"),), kv=kv)

    def ours_once(path: str, threads: int | None, settings: Settings, into: Any) -> rounds.Outcome:
        seen.append(settings.loading)
        into.threads = 1
        return rounds.Outcome("edge", (4.0,))

    monkeypatch.setattr(rounds, "_ours_once", ours_once)
    (measured,) = measure(str(tiny_gguf("llama")), settings)
    assert [o.error for o in measured.rounds["llama.cpp"]] == [None]
    assert seen == [{"kv": kv}]


def test_a_peer_that_is_missing_is_a_row(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = str(tiny_gguf("llama"))
    gone = Peer("ik-repacked", str(tmp_path / "no-python"))
    settings = Settings(CASES[:1], (1,), rounds=2, peers=(Peer("ik"), gone))
    rows = Report(path, measure(path, settings), settings).rows
    assert "median" in rows[0]
    assert "cannot import ik_llama_cpp" in rows[1]["error"]
    assert "cannot start" in rows[2]["error"] and "no-python" in rows[2]["error"]


def test_a_peer_that_cannot_load_says_why(tiny_gguf: Tiny, peer: None, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"no model")
    path = str(tiny_gguf("llama"))
    peers = (Peer("llama.cpp", model=str(tmp_path / "other")),)
    settings = Settings(CASES[:1], (1,), rounds=1, peers=peers)
    report = Report(path, measure(path, settings), settings)
    assert report.rows[1]["error"] == "cannot load the model: error: no magic in it"
    assert "cannot load the model" in report.lines()[-1]


def test_a_peer_that_fails_in_a_run(
    tiny_gguf: Tiny, peer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STATUS", "-3")
    path = str(tiny_gguf("llama"))
    settings = Settings(CASES[:1], (1,), rounds=2, peers=(Peer("llama.cpp"),))
    measured = measure(path, settings)
    assert [o.error for o in measured[0].rounds["llama.cpp"]] == ["llama_decode gave -3"] * 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('a last word')", "ended with code 1: a last word"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal 9: it said nothing"),
        ("print('no json')", "ended with code 0"),
        ("print([])", "ended with code 0"),
    ],
)
def test_a_process_that_dies(code: str, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        rounds._run([sys.executable, "-c", code], None)


def test_errors_of_our_own_process_are_errors(tiny_gguf: Tiny) -> None:
    job: dict[str, Any] = {"model": str(tiny_gguf("llama")), "threads": 0, "context": 64}
    job |= {"cases": [], "enough": 0, "most": 1, "options": {}}
    assert "threads is 0" in rounds.run_ours(job)["error"]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(()),
        Settings(CASES, ()),
        Settings(CASES, rounds=0),
        Settings((Case("prefill", 4),)),
        Settings((Case("decode", 0),)),
        Settings((Case("decode", 4, -1),)),
        Settings(CASES, peers=(Peer("other"),)),
        Settings(CASES, kv="q5"),
        Settings(CASES, peers=(Peer("ik", model="not/there.gguf"),)),
    ],
)
def test_what_cannot_be_measured(tiny_gguf: Tiny, settings: Settings) -> None:
    with pytest.raises(InputError):
        measure(str(tiny_gguf("llama")), settings)


def test_a_depth_over_the_context(tiny_gguf: Tiny) -> None:
    path = str(tiny_gguf("llama", context=256))
    with pytest.raises(ContextError, match="300 tokens"):
        measure(path, Settings((Case("decode", 44, 256),)))
    result = run("bench", path, "--prompt", "8", "--depth", "0,256", "--decode", "44")
    assert result.exit_code == 1
    assert "300 tokens was asked for, the model was made for 256" in result.stderr


# ---- the plot ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tiny_gguf: Tiny) -> Report:
    path = str(tiny_gguf("llama", type="Q4_0"))
    settings = Settings(CASES[:2], (1,), rounds=1)
    return Report(path, measure(path, settings), settings)


@pytest.mark.parametrize("form", plot.FORMATS)
def test_roofline(report: Report, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"roof.{form}"
    plot.roofline([report, report], path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if form == "png" else b"<svg" in data and b"GMAC/s" in data


def test_no_matplotlib(tiny_gguf: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match='pip install "matplotlib>='):
        plot.require()
    result = run("bench", str(tiny_gguf("llama")), "--plot", str(tmp_path / "x.svg"))
    assert result.exit_code == 1 and 'pip install "matplotlib>=3.7"' in result.stderr


# ---- the command ---------------------------------------------------------------------------------


def test_bench_command(tiny_gguf: Tiny, peer: None, tmp_path: Path) -> None:
    path, figure = tiny_gguf("llama"), tmp_path / "roof.svg"
    args = ["--prompt", "12,20,12", "--decode", "3", "--depth", "0,8", "--repeat", "1"]
    args += ["--against", "llama.cpp", "--peer-python", f"llama.cpp={sys.executable}", "-t", "1"]
    args += ["--peer-model", f"llama.cpp={path}", "--plot", str(figure)]
    done = edge_run("bench", path, *args, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    tests = [(r["test"], r["tokens"], r["depth"]) for r in result["results"][::2]]
    assert tests == [("prompt", 12, 0), ("prompt", 20, 0), ("decode", 3, 0), ("decode", 3, 8)]
    assert set(result) >= {"cpu", "isa", "packed_bytes", "builds", "rounds", "roofs", "peak_bytes"}
    assert result["kv"] == "f16"
    assert figure.stat().st_size > 1000


@pytest.mark.parametrize(
    "args",
    [
        ["--threads", "0"],
        ["--prompt", "-5"],
        ["--depth", "1;2"],
        ["--prompt", "0", "--decode", "0"],
        ["--against", "llama.cpp,other"],
        ["--peer-python", "ik"],
        ["--peer-python", f"ik={sys.executable}"],
        ["--against", "ik", "--peer-python", "ik=/not/there"],
        ["--against", "ik", "--peer-model", "ik=/not/there"],
        ["--plot", "roof.pdf"],
        ["--kv", "auto"],
    ],
    ids=" ".join,
)
def test_wrong_usage(args: list[str]) -> None:
    result = run("bench", "m.gguf", *args)
    assert result.exit_code == 2 and "Error: " in result.stderr


def test_the_wheel_brings_the_runner() -> None:
    assert (Path(rounds.__file__).parent / "runner.py").is_file()
    heavy = "{'edge', 'numpy'} & set(sys.modules)"
    code = f"import sys, runner; print({heavy})"
    env = {"PYTHONPATH": str(Path(runner.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---- the models of tests/bench -------------------------------------------------------------------


@pytest.fixture
def make_shape(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    import make_shape

    return make_shape


def test_shape_blocks_have_the_wanted_size(make_shape: Any) -> None:
    import gguf

    for type_name in make_shape.TYPES:
        raw = make_shape.random_rows(type_name, 32, 512, "test")
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
        rms = np.sqrt(np.mean(values.astype(np.float64) ** 2))
        assert values.shape == (32, 512) and rms == pytest.approx(0.02, rel=0.2), type_name


def test_shape_of_both_architectures(make_shape: Any, tmp_path: Path) -> None:
    """The same matrices, and a file that runs."""
    small = make_shape.Shape(256, 512, heads=4, kv_heads=2, head_dim=64, n_rot=48, vocab=1024)
    data = {}
    for arch in ("phi3", "llama"):
        path = tmp_path / f"{arch}.gguf"
        make_shape.write(path, "Q8_0", layers=2, arch=arch, shape=small)
        with Ours(path, 1, 64) as ours:
            runner.seconds(ours, Case("decode", 4, 8))
            tensors = ours.engine.gguf.tensors
            data[arch] = {name: bytes(t.data) for name, t in tensors.items() if len(t.shape) == 2}
    phi, llama = data["phi3"], data["llama"]
    split = (llama[f"blk.1.attn_{part}.weight"] for part in "qkv")
    assert phi["blk.1.attn_qkv.weight"] == b"".join(split)
    gate_up = (llama[f"blk.1.ffn_{part}.weight"] for part in ("gate", "up"))
    assert phi["blk.1.ffn_up.weight"] == b"".join(gate_up)


def test_shape_with_experts(make_shape: Any, tmp_path: Path) -> None:
    """A file that runs, and says how many experts a token uses."""
    small = make_shape.Shape(256, 256, 2, 2, 128, 128, 1024, experts=4, experts_used=2)
    path = tmp_path / "olmoe.gguf"
    make_shape.write(path, "IQ3_S", layers=2, arch="olmoe", shape=small)
    with Ours(path, 1, 64) as ours:
        runner.seconds(ours, Case("decode", 4, 8))
        file = ours.engine.gguf
    assert file.tensors["blk.1.ffn_down_exps.weight"].shape == (4, 256, 256)
    assert file.metadata["olmoe.expert_used_count"] == 2


def test_shape_vocabulary_is_consistent(make_shape: Any) -> None:
    import shape_vocabulary

    tokens, merges = shape_vocabulary.make(20_000)
    assert len(tokens) == len(set(tokens)) == 20_000
    assert len(merges) == len(set(merges)) == 20_000 - 256 - shape_vocabulary.N_CONTROL
    known = set(tokens[:256])
    for token, merge in zip(tokens[256:], merges, strict=False):
        left, right = merge.split(" ")
        assert left in known and right in known and left + right == token
        known.add(token)


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    import instructions

    return instructions


def test_counts_between_marks(instructions: Any, tmp_path: Path) -> None:
    """What ran before the first mark is not counted; addresses are the library's."""
    path = tmp_path / "counts"
    path.write_text("mark 0\n1010 5 9\nmark 1\n1010 5 2\n1020 3 1\nmark 2\n1020 3 4\n")
    prompt, decode = instructions.read_phases(path, 0x1000)
    assert prompt == {0x10: 10, 0x20: 3} and decode == {0x20: 12}


def test_instructions_may_fall_but_not_rise(
    instructions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "KNOWN", tmp_path / "known.json")
    case = ("Q4_0", "neon")
    instructions.update({case: {"prompt": 1000, "decode": 1000}})
    assert instructions.rises({case: {"prompt": 1030, "decode": 10}}) == []
    (line,) = instructions.rises({case: {"prompt": 1031, "decode": 1000}})
    assert line == "Q4_0 prompt, neon: 1,031 instructions a token, were 1,000"
    (line,) = instructions.rises({("Q4_0", "new"): {"decode": 1}})
    assert line == "Q4_0 decode, new: 1 instructions a token, were 0"


def test_mixes_name_types_that_exist(make_shape: Any) -> None:
    matrices = list(make_shape.matrices("Q4_K_M", None, 32, "phi3"))
    down = [m.type for m in matrices if m.name.endswith("ffn_down")]
    assert down.count("Q6_K") == down.count("Q4_K") == 16 and matrices[0].type == "Q6_K"
    for kind in make_shape.MIXES:
        types = {m.type for m in make_shape.matrices(kind, None, 8, "llama")}
        assert types <= set(make_shape.TYPES)


# ---- the scripts of tests/bench ------------------------------------------------------------------


def script(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """A script of tests/bench, as a process."""
    command = [sys.executable, str(ROOT / "tests" / "bench" / f"{name}.py"), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)


def test_depth_table(make_shape: Any, tiny_gguf: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "depth.json"
    args = ["--kv", "f16", "--depth", "8,70", "--decode", "2", "--rounds", "2", "--threads", "1"]
    done = script("depth", tiny_gguf("llama"), *args, "--json", out)
    assert [line.split(" | ")[:2] for line in done.stdout.splitlines()[-2:]] == [
        ["| 8", "f16"],
        ["| 70", "f16"],
    ]
    results = json.loads(out.read_text())["results"]
    assert [len(row["tokens_per_second"]) for row in results] == [2, 2]


def test_depth_table_of_types_and_peers(make_shape: Any) -> None:
    import depth

    speeds: Any = {("f16", 8, "edge"): [1.0, 2.0], ("q8", 8, "edge"): [2.0, 6.0]}
    speeds |= {("f16", 8, "ik"): "no ik | here", ("q8", 8, "ik"): [1.0, 1.0]}
    rows = depth.markdown(speeds, ["ik"]).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| 8 | f16 | 1.5 |  |  | no ik / here |"
    assert rows[3] == "| 8 | q8 | 4.0 | **2.50** (2.00 to 3.00) | 1.0 | **4.00** (2.00 to 6.00) |"


def test_sessions_second_turn_and_long_run(tiny_gguf: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "sessions.json"
    args = ["--tokens", "96", "--rounds", "2", "--threads", "1"]
    args += ["--long", "192", "--every", "64", "--window", "256"]
    done = script("sessions", tiny_gguf("llama", context=512), *args, "--json", out)
    results = json.loads(out.read_text())["results"]
    (turn,), (stop,), (slide,) = results["turn"], results["stop"], results["slide"]
    assert len(results["resume"]) == 2 and len(results["prefix"]) == 1
    assert slide["generated"] == 192
    assert 0 < turn["share_min"] <= turn["share"] <= turn["share_max"]
    assert len(turn["seconds"]) == len(turn["against_seconds"]) == 2
    assert (stop["finish_reason"], stop["generated"]) == ("length", 192)
    assert [tokens for tokens, _, _ in stop["samples"]] == [64, 128, 192]
    assert min(stop["peak"], stop["samples"][-1][2]) > 1 << 20
    assert "| stop | 256 | 192 |" in done.stdout and "second turn" in done.stdout
