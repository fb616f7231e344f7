"""Fixtures of the emulated boards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import build, site_packages
from machines import DIGESTS, ROOT, Land, output_of
from tiny import write_tiny


@pytest.fixture(scope="session")
def selftest() -> Callable[[str], Path]:
    """selftest(arch) -> the self-test of all kernels for a QEMU architecture, built once."""
    built: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in built:
            preset = {"aarch64": "linux-aarch64-gcc", "arm": "linux-armhf-gcc"}[arch]
            build("cmake", "--preset", preset, f"-DPython_EXECUTABLE={sys.executable}")
            build("cmake", "--build", "--preset", preset, "--target", "all", "selftest")
            built[arch] = ROOT / "build" / preset / "selftest"
        return built[arch]

    return get


@pytest.fixture(scope="session")
def site() -> Callable[[Land], Path]:
    """site(land) -> a site-packages for it, see `site_packages`."""
    return site_packages


def _mixed(name: str) -> str:
    return ("Q4_K", "IQ3_S", "Q6_K", "IQ2_XS", "Q5_0", "BF16")[len(name) % 6]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What digests.py is run with: tiny models, each with a type of keys and values."""
    folder, wide = tmp_path_factory.mktemp("boards"), {"dim": 256, "ffn": 256}
    q4_0 = write_tiny(folder / "q4_0.gguf", type="Q4_0", tied=False, head_dim=32)
    f16 = write_tiny(folder / "f16.gguf", type="F16", head_dim=48)
    iq3_s = write_tiny(folder / "iq3_s.gguf", type="IQ3_S", **wide)
    q4_k = write_tiny(folder / "q4_k.gguf", "phi3", type="Q4_K", window=50, **wide)
    mixed = write_tiny(folder / "mixed.gguf", "phi3", type=_mixed, head_dim=64, **wide)
    kinds = [(q4_0, "q8"), (q4_0, "q4"), (f16, "f16"), (iq3_s, "f16"), (iq3_s, "q8:compact")]
    return [f"{path}:{kv}" for path, kv in [*kinds, (q4_k, "q8"), (mixed, "q4")]]


@pytest.fixture(scope="session")
def digests(cases: list[str]) -> dict[str, str]:
    """Case -> digest, on this machine, whose instruction sets agree."""
    run = subprocess.run(
        [sys.executable, DIGESTS, *cases],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "EDGE_CACHE_SIZE": "0"},
    )
    by_isa: dict[str, dict[str, str]] = json.loads(output_of(run))
    assert all(each == by_isa["scalar"] for each in by_isa.values())
    return by_isa["scalar"]
