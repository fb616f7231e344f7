"""`edge-run` on real files: small models that work, and files that must be refused in one line."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_model import ROOT, assert_one_line, edge_run, run
from tiny import CHAT_TEMPLATE

import edge

Tiny = Callable[..., Path]
"""The `tiny_gguf` fixture: options -> the path of a small model."""


def test_info(tiny_gguf: Tiny) -> None:
    path = tiny_gguf("llama", type="Q4_0")
    facts = json.loads(run("info", str(path), "--json").stdout)
    assert facts["architecture"] == "llama" and facts["name"] == "tiny llama"
    assert facts["bytes"] == path.stat().st_size
    assert facts["parameters"] == sum(row["parameters"] for row in facts["types"].values())
    assert set(facts["types"]) == {"Q4_0", "F32"}
    assert (facts["layers"], facts["dim"], facts["heads"], facts["kv_heads"]) == (2, 64, 4, 2)
    assert (facts["context"], facts["vocabulary"]) == (256, 288)
    assert facts["chat_template"] and facts["runs"] and facts["why_not"] is None
    text = run("info", str(path)).stdout
    for word in ("tiny llama", "Q4_0", "256", "4 (2 KV)", "gpt2", "runs           yes"):
        assert word in text


def test_info_of_a_model_that_cannot_run(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = corrupt(tiny_gguf("llama"), tmp_path, b"llama", b"lorem")
    result = run("info", str(path))
    assert result.exit_code == 0
    assert "lorem" in result.stdout and "no: " in result.stdout


def test_info_of_a_type_that_cannot_run(tiny_gguf: Tiny, tmp_path: Path) -> None:
    facts = json.loads(run("info", str(bad_type(tiny_gguf, tmp_path)), "--json").stdout)
    assert not facts["runs"] and "I32" in facts["why_not"]
    row = {"tensors": 1, "parameters": 64, "bytes": 256, "layouts": [], "memory_bytes": 0}
    assert facts["types"]["I32"] == row


@pytest.mark.native
@pytest.mark.all_isas
def test_what_a_file_leaves_out_is_said_once(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = corrupt(tiny_gguf("llama"), tmp_path, b"tokenizer.ggml.pre", b"tokenizer.ggml.prx")
    note = "no tokenizer.ggml.pre: words are cut in a way that may not be the model's"
    assert json.loads(run("info", str(path), "--json").stdout)["notes"] == [note]
    assert f"note           {note}" in run("info", str(path)).stdout
    done = edge_run("complete", path, "-", "-n", "1", "--quiet", stdin=b"Hi")
    assert done.stderr.decode() == f"edge-run: warning: {path}: {note}\n"
    with edge.load(path) as model, pytest.warns(edge.EdgeWarning, match="ggml.pre: words") as seen:
        model.session().generate("a b", max_tokens=1)
        model.session().generate("a b", max_tokens=1)
    assert len(seen) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_bench(tiny_gguf: Tiny, as_json: bool) -> None:
    args = ["--prompt", "12", "--decode", "3", "--repeat", "2", "--threads", "1,2"]
    result = run("bench", str(tiny_gguf("llama")), *args, *(["--json"] if as_json else []))
    assert (result.exit_code, result.stderr) == (0, "")
    if as_json:
        rows = json.loads(result.stdout)["results"]
        assert [(row["threads"], row["test"], row["tokens"]) for row in rows] == [
            (1, "prompt", 12),
            (1, "decode", 3),
            (2, "prompt", 12),
            (2, "decode", 3),
        ]
        for row in rows:
            assert len(row["tokens_per_second"]) == 2
            assert 0 < row["min"] <= row["median"] <= row["max"]
    else:
        assert "prompt 12" in result.stdout and "tokens/s" in result.stdout


def test_complete_is_reproducible(tiny_gguf: Tiny) -> None:
    args = ("complete", tiny_gguf("llama"), "-p", "Hello the world", "-n", "8", "--seed", "3")
    first, second = edge_run(*args, "--json"), edge_run(*args)
    assert first.returncode == second.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer["text"].encode() == second.stdout
    assert answer["usage"]["completion_tokens"] == len(answer["tokens"]) == 8
    assert b"tokens" in second.stderr and b"MiB" in second.stderr


def test_chat_with_a_real_model(tiny_gguf: Tiny) -> None:
    done = edge_run("chat", tiny_gguf("phi3"), "-n", "5", stdin=b"Hello?")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"\n") == 1


def corrupt(path: Path, folder: Path, old: bytes, new: bytes) -> Path:
    """A copy with the first `old` replaced, which must be there, by `new` of the same length."""
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    copy = folder / "bad.gguf"
    copy.write_bytes(data.replace(old, new, 1))
    return copy


def with_template(path: Path, folder: Path, template: str) -> Path:
    """A copy with another chat template."""
    old = CHAT_TEMPLATE.encode()
    return corrupt(path, folder, old, template.encode().ljust(len(old)))


def bad_missing(tiny: Tiny, folder: Path) -> Path:
    return folder / "missing.gguf"


def bad_directory(tiny: Tiny, folder: Path) -> Path:
    return folder


def bad_empty(tiny: Tiny, folder: Path) -> Path:
    (folder / "empty.gguf").touch()
    return folder / "empty.gguf"


def bad_not_a_gguf(tiny: Tiny, folder: Path) -> Path:
    shutil.copy(__file__, folder / "text.gguf")
    return folder / "text.gguf"


def bad_truncated_header(tiny: Tiny, folder: Path) -> Path:
    (folder / "cut.gguf").write_bytes(tiny("llama").read_bytes()[:2000])
    return folder / "cut.gguf"


def bad_truncated_data(tiny: Tiny, folder: Path) -> Path:
    (folder / "cut.gguf").write_bytes(tiny("llama").read_bytes()[:-100])
    return folder / "cut.gguf"


def bad_architecture(tiny: Tiny, folder: Path) -> Path:
    return corrupt(tiny("llama"), folder, b"llama", b"lorem")


def attn_norm(kind: int) -> bytes:
    """The header of a vector of 64, with its type."""
    return b"blk.0.attn_norm.weight" + struct.pack("<IQI", 1, 64, kind)


def bad_unknown_type(tiny: Tiny, folder: Path) -> Path:
    return corrupt(tiny("llama"), folder, attn_norm(0), attn_norm(199))


def bad_type(tiny: Tiny, folder: Path) -> Path:
    """A type that the format has and that is no weight: 32-bit integers."""
    return corrupt(tiny("llama"), folder, attn_norm(0), attn_norm(26))


def bad_missing_tensor(tiny: Tiny, folder: Path) -> Path:
    return corrupt(tiny("llama"), folder, b"blk.1.ffn_norm.weight", b"blk.1.ffn_morn.weight")


def bad_shape(tiny: Tiny, folder: Path) -> Path:
    def header(k: int, n: int) -> bytes:
        return b"blk.0.ffn_gate.weight" + struct.pack("<IQQ", 2, k, n)

    return corrupt(tiny("llama"), folder, header(64, 96), header(32, 192))


def bad_nan_scales(tiny: Tiny, folder: Path) -> Path:
    path, copy = tiny("llama", type="Q8_0"), folder / "nan.gguf"
    data = bytearray(path.read_bytes())
    n_bytes = 288 * 64 // 32 * 34  # the embedding, first in the file
    start = len(data) - data_bytes(path)
    for i in range(start, start + n_bytes, 34):
        data[i : i + 2] = b"\x00\x7e"
    copy.write_bytes(data)
    return copy


def bad_template_raises(tiny: Tiny, folder: Path) -> Path:
    return with_template(tiny("llama"), folder, "{{ raise_exception('no') }}")


def bad_template_loops(tiny: Tiny, folder: Path) -> Path:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    return with_template(tiny("llama"), folder, loop)


def bad_template_syntax(tiny: Tiny, folder: Path) -> Path:
    return with_template(tiny("llama"), folder, "{% if %}")


def data_bytes(path: Path) -> int:
    """Bytes from the first tensor's data to the end of the file."""
    from edge.files.gguf import GGUF

    with GGUF.open(path) as gguf:
        return gguf.n_bytes - min(tensor.offset for tensor in gguf.tensors.values())


BAD_MODELS = {
    make.__name__[4:]: (make, match)
    for make, match in (
        (bad_missing, "no such file"),
        (bad_directory, "director"),
        (bad_empty, "empty"),
        (bad_not_a_gguf, "gguf"),
        (bad_truncated_header, ""),
        (bad_truncated_data, ""),
        (bad_architecture, "lorem"),
        (bad_unknown_type, "199"),
        (bad_type, "I32"),
        (bad_missing_tensor, "ffn_"),
        (bad_shape, "shape"),
        (bad_nan_scales, "finite"),
        (bad_template_raises, "template"),
        (bad_template_loops, "template"),
        (bad_template_syntax, "template"),
    )
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(tiny_gguf: Tiny, tmp_path: Path, name: str) -> None:
    make, match = BAD_MODELS[name]
    done = edge_run("chat", make(tiny_gguf, tmp_path), "-p", "Hello")
    assert_one_line(done.returncode, done.stderr, match)
    assert done.stdout == b""


def test_info_reads_what_chat_refuses(tiny_gguf: Tiny, tmp_path: Path) -> None:
    for make in (bad_architecture, bad_missing_tensor, bad_shape, bad_template_syntax):
        result = run("info", str(make(tiny_gguf, tmp_path)))
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("n_bytes", [None, -30_000])
def test_info_shows_types_that_it_does_not_know(
    tiny_gguf: Tiny, tmp_path: Path, n_bytes: int | None
) -> None:
    path = bad_unknown_type(tiny_gguf, tmp_path)
    path.write_bytes(path.read_bytes()[:n_bytes])
    result = run("info", str(path), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    assert facts["types"]["type 199"]["tensors"] == 1 and facts["types"]["F32"]["tensors"] > 1
    assert not facts["runs"] and "type 199" in facts["why_not"]
    text = run("info", str(path)).stdout
    assert "runs           no: " in text and "type 199     1 tensors" in text


def test_info_and_plan_take_the_first_part_of_a_download(tiny_gguf: Tiny, tmp_path: Path) -> None:
    path = bad_truncated_data(tiny_gguf, tmp_path)
    whole, size = tiny_gguf("llama").stat().st_size, path.stat().st_size
    assert run("plan", str(path), "--threads", "1").exit_code == 0
    result = run("info", str(path), "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    assert (facts["bytes"], facts["whole_bytes"], facts["complete"]) == (size, whole, False)
    assert not facts["runs"] and "are there, fetch the rest" in facts["why_not"]
    text = run("info", str(path)).stdout
    assert "KiB of " in text and "runs           no: " in text
    facts = json.loads(run("info", str(tiny_gguf("llama")), "--json").stdout)
    assert facts["complete"] and facts["runs"] and facts["whole_bytes"] == whole
    assert run("info", str(bad_truncated_header(tiny_gguf, tmp_path))).exit_code == 1


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_prompt_longer_than_the_context(tiny_gguf: Tiny, command: str) -> None:
    done = edge_run(command, tiny_gguf("llama"), "-c", "16", stdin=b"Hello the world " * 40)
    assert_one_line(done.returncode, done.stderr, "context")
    assert b"16" in done.stderr


def test_context_longer_than_the_model_s(tiny_gguf: Tiny) -> None:
    done = edge_run("chat", tiny_gguf("llama"), "-c", "300", "-p", "Hello")
    assert_one_line(done.returncode, done.stderr, "256")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("mebibytes", [2, 16, 64])
def test_no_memory_is_one_line(tiny_gguf: Tiny, mebibytes: int) -> None:
    path = tiny_gguf("llama", context=65536, n_heads=8, head_dim=64, n_kv_heads=8)  # 256 MiB of KV
    limit = (
        "import resource, edge.cli.answer, edge.cli.complete, edge.model, edge.tokenizer\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        f"limit = pages * resource.getpagesize() + ({mebibytes} << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))"
    )
    done = edge_run("complete", path, "-c", "65536", "-n", "1", "-p", "Hello", code=limit)
    assert_one_line(done.returncode, done.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send there")
def test_sigint_reaches_a_real_model(tiny_gguf: Tiny) -> None:
    command = [sys.executable, "-m", "edge.cli", "complete", str(tiny_gguf("llama")), "-p", "Hello"]
    command += ["--logit-bias", "287=-inf", "--logit-bias", "285=-inf"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        stderr = child.stderr.read()
        assert child.wait(30) in (0, 130)  # 0: it had filled its context already
        assert b"Traceback" not in stderr
