"""`edge-run advise`: what fits, how fast it will be, and which file is recommended."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import ROOT, assert_one_line, run
from test_hub import REPO, Hub, home, hub  # noqa: F401 (fixtures)

import edge.evaluate.advise as library
from edge.bench.tune import Times
from edge.engine import predict
from edge.engine.predict import Bandwidth, Product
from edge.errors import InputError, MemoryBudgetError
from edge.evaluate.advise import WEIGHT_ERRORS, AdviceLimits, advise
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.weights.packed import supported_types

Tiny = Callable[..., Path]
TYPES = ("Q4_0", "Q8_0", "F16")


@pytest.fixture(autouse=True)
def machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Matmuls at 1 GB/s in every layout, and no models but those of a test."""

    def now(cls: type[Bandwidth], threads: int, products: Any) -> Bandwidth:
        return cls(threads, 1e9, 0.0, dict.fromkeys(products, 1e9))

    monkeypatch.setattr(Bandwidth, "now", classmethod(now))


@pytest.fixture
def folder(tiny_gguf: Tiny, tmp_path: Path) -> Path:
    """One model in three types."""
    for name in TYPES:
        path = tmp_path / "here" / f"tiny-{name}.gguf"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(tiny_gguf(type=name, context=8192), path)
    return tmp_path / "here"


def told(*args: str | Path, code: int = 0) -> list[dict[str, Any]]:
    result = run("advise", *map(str, args), "--json")
    assert result.exit_code == code, result.stderr
    models: list[dict[str, Any]] = json.loads(result.stdout)["models"]
    return models


def files_of(*args: str | Path) -> dict[str, dict[str, Any]]:
    (model,) = told(*args)
    return {file["type"]: file for file in model["files"]}


def test_a_folder(folder: Path) -> None:
    (model,) = told(folder)
    files = {file["type"]: file for file in model["files"]}
    assert files.keys() == set(TYPES) and all(file["fits"] for file in files.values())
    assert model["recommended"] == f"{folder}:Q8_0"  # F16 has no error either, and is slower
    assert "no error of weights that is noticed" in model["reason"]
    speeds = [files[name]["tokens_per_second"] for name in TYPES]
    assert [*speeds[0]] == ["0", "4096"]
    assert speeds[0]["0"] > speeds[1]["0"] > speeds[2]["0"] > speeds[2]["4096"]
    errors = [files[name]["weight_error_estimated"] for name in TYPES]
    assert errors[0] > errors[1] > errors[2]


def test_text(folder: Path) -> None:
    result = run("advise", str(folder))
    assert result.exit_code == 0
    assert re.search(r"tiny-?.*\n +file +memory +bits +error +at 0 +at 4096", result.stdout, re.I)
    assert f"Take {folder}:Q8_0\n" in result.stdout
    assert "CPU has" in result.stdout  # what it makes of F16
    assert result.stderr == "measuring matmuls of 3 layouts\n"


def test_least_speed(folder: Path) -> None:
    speeds = {name: file["tokens_per_second"]["0"] for name, file in files_of(folder).items()}
    middle = (speeds["Q4_0"] + speeds["Q8_0"]) / 2
    (model,) = told(folder, "--min-speed", str(middle))
    assert model["recommended"].endswith(":Q4_0") and "reach" in model["reason"]
    (model,) = told(folder, "--min-speed", "999999")
    assert model["recommended"].endswith(":Q4_0") and "comes nearest" in model["reason"]
    assert run("advise", str(folder), "--min-speed", "-1").exit_code == 2


def test_memory(folder: Path) -> None:
    needed = {name: file["needed_bytes"] for name, file in files_of(folder).items()}
    assert needed["Q4_0"] < needed["Q8_0"] < needed["F16"]
    half = (needed["Q4_0"] + needed["Q8_0"]) // 2
    (model,) = told(folder, "--memory", str(half))
    assert model["recommended"].endswith(":Q4_0") and "only one that fits" in model["reason"]
    assert [file["fits"] for file in model["files"] if file["type"] == "F16"] == [False]
    less = files_of(folder, "--context", "64")
    assert less["Q4_0"]["needed_bytes"] < needed["Q4_0"] and less["Q4_0"]["context"] == 64


def test_nothing_fits(folder: Path) -> None:
    (model,) = told(folder, "--memory", "1MB", code=1)
    assert model["recommended"] is None
    assert "nothing fits 1MB" in model["reason"] and "Q4_0 comes nearest" in model["reason"]
    assert "the least that it runs in is" in model["reason"]
    text = run("advise", str(folder), "--memory", "1MB")
    assert text.exit_code == 1 and "too large" in text.stdout and "nothing fits" in text.stdout


def test_what_would_make_it_fit(tiny_gguf: Tiny) -> None:
    path = tiny_gguf(context=4096, n_heads=16, n_kv_heads=16, head_dim=128)
    ((half,),) = (model["files"] for model in told(path, "--context", "2048"))
    (model,) = told(path, "--memory", str(half["needed_bytes"]), code=1)
    assert "comes nearest" in model["reason"] and "it fits with --context" in model["reason"]


def test_files_that_do_not_run(folder: Path) -> None:
    """They are listed with the reason, and the others are advised on."""
    whole = (folder / "tiny-Q4_0.gguf").read_bytes()
    (folder / "tiny-Q5_0.gguf").write_bytes(whole[:-100])
    (folder / "tiny-Q5_1.gguf").write_bytes(b"GGUF" + bytes(10))
    (folder / "tiny-Q8_K.gguf").write_bytes(b"no model")
    files = files_of(folder)
    for name in ("Q5_0", "Q5_1", "Q8_0"):
        assert bool(files[name]["problem"]) == (name != "Q8_0")
    assert "cut off" in files["Q5_0"]["problem"]
    assert str(folder / "tiny-Q5_1.gguf") in run("advise", str(folder)).stdout
    for path in folder.iterdir():
        path.write_bytes(b"no model")
    (model,) = told(folder, code=1)
    assert "none of these can be run" in model["reason"] and model["family"] is None


def test_a_file_and_its_family(tiny_gguf: Tiny, folder: Path, home: Path) -> None:  # noqa: F811
    """Others of the family come from what is on this machine."""
    alone = told(folder / "tiny-Q4_0.gguf")
    assert [file["name"] for file in alone[0]["files"]] == [str(folder / "tiny-Q4_0.gguf")]
    place = home / ".lmstudio" / "models" / "owner" / "repo"
    place.mkdir(parents=True)
    shutil.copy(folder / "tiny-Q8_0.gguf", place)
    shutil.copy(tiny_gguf("qwen2"), place / "other-F32.gguf")
    (model,) = told(folder / "tiny-Q4_0.gguf")
    assert {file["type"] for file in model["files"]} == {"Q4_0", "Q8_0"}
    assert model["recommended"] == "owner/repo:Q8_0"
    (model,) = told("owner/repo:Q8_0")
    assert [file["name"] for file in model["files"]] == ["owner/repo:Q8_0"]
    assert len(told()) == 2  # two families are on this machine


def test_nothing_on_this_machine(tmp_path: Path) -> None:
    result = run("advise")
    assert_one_line(result.exit_code, result.stderr, "no models here")
    for name, why in (("no-such", "no such file"), (str(tmp_path), "has no GGUF model")):
        result = run("advise", name)
        assert_one_line(result.exit_code, result.stderr, why)
    (tmp_path / "model.onnx").touch()
    result = run("advise", str(tmp_path))
    assert_one_line(result.exit_code, result.stderr, "ONNX")
    with pytest.raises(InputError, match="min_speed"):
        advise(None, AdviceLimits(min_speed=-1))


def test_a_repository(hub: Hub) -> None:  # noqa: F811
    """Headers alone are fetched."""
    (model,) = told(REPO)
    assert [file["name"] for file in model["files"]] == [
        f"{REPO}:{t}" for t in TYPES[1:] + TYPES[:1]
    ]
    assert all(file["fits"] and file["path"] is None for file in model["files"])
    assert model["recommended"] == f"{REPO}:Q8_0"
    assert all(ranges and all(ranges) for t in TYPES if (ranges := hub.ranges_of(f"tiny-{t}.gguf")))


def test_a_repository_of_large_files(hub: Hub) -> None:  # noqa: F811
    """The headers of files that are larger than the memory stay where they are, but for one."""
    sizes = {name: len(data) for name, data in hub.repos[REPO].items()}
    (model,) = told(REPO, "--memory", str(sizes["tiny-Q4_0.gguf"] - 1), code=1)
    assert "Q4_0 comes nearest" in model["reason"]
    assert not hub.ranges_of("tiny-F16.gguf") and not hub.ranges_of("tiny-Q8_0.gguf")
    problems = {file["type"]: file["problem"] for file in model["files"]}
    assert problems["F16"] and problems["Q8_0"] and not problems["Q4_0"]


def test_a_repository_without_models(hub: Hub) -> None:  # noqa: F811
    hub.repos["owner/empty"] = {"README.md": b"# nothing"}
    result = run("advise", "owner/empty")
    assert_one_line(result.exit_code, result.stderr, "no GGUF model")
    hub.repos["owner/bad"] = {"bad-Q4_0.gguf": b"no model"}
    (model,) = told("owner/bad", code=1)
    assert "none of these can be run" in model["reason"]
    url = f"{hub.url}/files/tiny-Q4_0.gguf"
    hub.files["/files/tiny-Q4_0.gguf"] = hub.repos[REPO]["tiny-Q4_0.gguf"]
    (model,) = told(url)
    assert model["files"][0]["fits"] and "only one that fits" in model["reason"]


def test_verify(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are held against what the files do."""
    monkeypatch.setattr(library, "ROUNDS", 1)
    monkeypatch.setattr("edge.bench.rounds.Machine", _NoMachine)
    (folder / "tiny-F16.gguf").unlink()
    for file in files_of(folder, "--verify").values():
        predicted, measured = file["tokens_per_second"]["0"], file["measured_tokens_per_second"]
        assert file["prediction_error"] == pytest.approx(predicted / measured - 1)
    assert re.search(r"measured +off\n", run("advise", str(folder), "--verify").stdout)


def test_verify_on_a_busy_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([Times(10, 5, 2), Times(20, 14, 3)])
    monkeypatch.setattr(Times, "now", classmethod(lambda cls, cpus: next(seen)))
    monkeypatch.setattr("edge.evaluate.advise._verified", lambda file, options, say: file)
    assert "other programs took 80% of" in run("advise", str(folder), "--verify").stderr


class _NoMachine:
    """Roofs that nobody waits for."""

    def __init__(self, threads: int) -> None: ...
    def measure(self) -> tuple[float, float]:
        return 1e9, 1e12

    def __enter__(self) -> _NoMachine:
        return self

    def __exit__(self, *error: object) -> None: ...


def test_data_that_are_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that promises what the data do not keep is found by --verify."""
    monkeypatch.setattr("edge.bench.rounds.Machine", _NoMachine)
    path = folder / "tiny-F16.gguf"
    data = bytearray(path.read_bytes())
    data[-2000:] = b"\xff" * 2000  # NaN
    path.write_bytes(data)
    files = files_of(folder, "--verify")
    assert "NaN" in files["F16"]["problem"] and not files["F16"]["fits"]
    assert files["Q8_0"]["problem"] is None


def test_no_memory_to_measure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cls: type[Bandwidth], threads: int, products: Any) -> Bandwidth:
        raise MemoryBudgetError("too little to measure", needed=2, budget=1)

    monkeypatch.setattr(Bandwidth, "now", classmethod(refuse))
    (model,) = told(folder, "--min-speed", "5")
    assert model["recommended"].endswith(":Q8_0")
    assert all(file["tokens_per_second"] == {} for file in model["files"])
    assert "too little to measure" in run("advise", str(folder)).stderr


@pytest.mark.parametrize("has", [0, 1])
def test_what_is_said_of_bfloat16(folder: Path, monkeypatch: pytest.MonkeyPatch, has: int) -> None:
    class Lib:
        edge_isa_has_bf16 = staticmethod(lambda isa: has)

    monkeypatch.setattr(library, "lib", Lib)
    (model,) = told(folder)
    assert ("EDGE_NATIVE_BF16=1" in model["reason"]) == bool(has)
    assert re.search(r"a token of F16 reads 1\.\d times the bytes", model["reason"])
    for name in ("Q4_0", "Q8_0"):
        (folder / f"tiny-{name}.gguf").unlink()
    (model,) = told(folder)
    assert "bfloat16" in model["reason"] and "times" not in model["reason"]


def test_errors_of_types() -> None:
    """They follow the bits, within a family of types, and are of types that run."""
    assert WEIGHT_ERRORS.keys() <= set(supported_types())
    for order in ("Q2_K Q3_K Q4_K Q5_K Q6_K Q8_0 F16", "IQ1_S IQ2_XXS IQ2_XS IQ3_XXS IQ3_S IQ4_XS"):
        errors = [WEIGHT_ERRORS[name] for name in order.split()]
        assert errors == sorted(errors, reverse=True)


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+%) \|$", page, re.MULTILINE)
    types = {name: TENSOR_TYPES[TYPE_NUMBERS[name]] for name in WEIGHT_ERRORS}
    assert rows == [
        (name, f"{8 * t.block_bytes / t.block:.2f}", f"{WEIGHT_ERRORS[name]:.2%}")
        for name, t in types.items()
    ]


def test_a_type_whose_error_is_unknown(tiny_gguf: Tiny, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    shutil.copy(tiny_gguf(type="MXFP4"), folder / "tiny-MXFP4.gguf")
    assert files_of(folder)["MXFP4"]["weight_error_estimated"] is None
    assert " ? " in run("advise", str(folder)).stdout


@pytest.mark.native
@pytest.mark.any_isa
@pytest.mark.parametrize("threads", [1, 2])
def test_matmuls_are_timed(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Every layout, with one column and with two."""
    monkeypatch.setattr(predict, "buffer_bytes", lambda cache, times: 20 << 20)
    monkeypatch.setattr(predict, "SECONDS", 0)
    monkeypatch.setattr(predict, "LEAST_ROUNDS", 1)
    forms = [(name, form) for name in supported_types() for form in ("fast", "compact")]
    layouts = {predict.product_of(*pair).layout for pair in forms}
    start, rates = predict._matmuls(threads, [Product(name, c) for name in layouts for c in (1, 2)])
    assert len(rates) == 2 * len(layouts) and min(rates.values()) > 0 and start >= 0
