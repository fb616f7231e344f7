"""The Android library without Android: under musl's loader, whose libc.so has the types of
Android's, and in a Python of the GNU C library, by libraries of Android's names that only lead to
it; both are given the one function that has another name in Android. What neither has, as Android's
own loader, is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from builds import build, pip_install, wheel_for
from machines import BOOKWORM, CPU, DIGESTS, PHONE, PI3, ROOT, Land, emulate, output_of, run_python

pytestmark = pytest.mark.board

SOURCE = ROOT / "tests" / "native" / "load.c"
ERRNO = ROOT / "tests" / "native" / "errno.c"
ANDROID = "android_*_arm64_v8a"
C = ("-std=gnu11", "-O1", "-I", ROOT / "native", SOURCE, "-o")


@pytest.fixture(scope="module")
def checksum(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What load.c computes here, on each instruction set."""
    program = tmp_path_factory.mktemp("load") / "load"
    build("cc", *C, program, "-ldl")
    run = subprocess.run(
        [program, ROOT / "edge" / "libedge.so"], capture_output=True, text=True, timeout=60
    )
    (sum_,) = {line.split()[1] for line in output_of(run).splitlines()}
    return sum_


@pytest.fixture(scope="module")
def musl_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """load.c for musl, which it finds at run time."""
    program = tmp_path_factory.mktemp("musl") / "load"
    zig = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-dynamic")
    build(*zig, "-rdynamic", ERRNO, *C, program)
    return program


@pytest.mark.parametrize("cpu", [PI3, PHONE], ids=str)
@pytest.mark.parametrize("platform", [ANDROID, "musllinux_*_aarch64"])
def test_under_the_loader_of_musl(
    musl_program: Path, checksum: str, tmp_path: Path, platform: str, cpu: CPU
) -> None:
    """With four threads."""
    with zipfile.ZipFile(wheel_for(platform)) as archive:
        library = archive.extract("edge/libedge.so", tmp_path)
    run = emulate(cpu, musl_program, library, root=BOOKWORM.root)
    lines = dict(line.split() for line in output_of(run).splitlines())
    assert lines == dict.fromkeys(cpu.isas, checksum)


@pytest.fixture(scope="module")
def shims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libc.so, libm.so and libdl.so that need the GNU ones and hold next to nothing."""
    folder = tmp_path_factory.mktemp("shims")
    for name in ("libc.so", "libm.so", "libdl.so"):
        build(
            *("aarch64-linux-gnu-gcc", "-shared", "-nostdlib", f"-Wl,-soname,{name}"),
            *("-fPIC", ERRNO, "-Wl,--no-as-needed", "-lc", "-lm", "-o", folder / name),
        )
    return folder


def test_wheel_in_a_python_without_cffi(
    site: Callable[[Land], Path],
    shims: Path,
    digests: dict[str, str],
    tmp_path: Path,
) -> None:
    """Installed as for Android, called by ctypes."""
    pip_install(tmp_path, "3.13", ["android_21_arm64_v8a"], wheel_for(ANDROID), "--no-deps")
    env = {
        "PYTHONPATH": f"{tmp_path}:{site(BOOKWORM)}",
        "LD_LIBRARY_PATH": str(shims),
        "EDGE_BINDING": "ctypes",
        "EDGE_CACHE_SIZE": "0",
    }
    run = run_python(PI3, BOOKWORM, site(BOOKWORM), DIGESTS, *digests, env=env)
    assert json.loads(output_of(run)) == dict.fromkeys(PI3.isas, digests)
