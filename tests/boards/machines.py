"""Emulated machines: QEMU's CPUs, and the user lands that scripts/boards fetched.

A CPU has what the real one has, in HWCAP and in what it refuses to execute; speed says nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOARDS = ROOT / "build" / "boards"
DIGESTS = ROOT / "tests" / "boards" / "digests.py"
SECONDS = 300  # after which an emulated program hangs


@dataclass(frozen=True)
class CPU:
    """name: as QEMU calls it; isas: what runs on it, the default last; lacks: what would not."""

    arch: str  # of qemu-<arch>
    name: str
    isas: tuple[str, ...]
    lacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.arch}-{self.name}"


CPUS = (
    CPU("aarch64", "cortex-a53", ("scalar", "neon"), ("dotprod", "i8mm")),  # Pi 3, Zero 2 W
    CPU("aarch64", "cortex-a72", ("scalar", "neon"), ("dotprod", "i8mm")),  # Pi 4
    CPU("aarch64", "cortex-a76", ("scalar", "neon", "dotprod"), ("i8mm",)),  # Pi 5
    CPU("aarch64", "cortex-a710", ("scalar", "neon", "dotprod", "i8mm")),  # phones
    CPU("aarch64", "max,sve=off", ("scalar", "neon", "dotprod", "i8mm")),
    CPU("aarch64", "max", ("scalar", "neon", "dotprod", "i8mm")),
    CPU("arm", "cortex-a7", ("scalar", "neon32")),  # Pi 2; what 32-bit systems are built for
    CPU("arm", "max", ("scalar", "neon32")),
)
PI3, PI4, PI5, PHONE = CPUS[:4]
PI2 = CPUS[6]


@dataclass(frozen=True)
class Land:
    """A user land with a Python. wheels: the architecture as wheels call it."""

    name: str
    python: str
    wheels: str
    libraries: tuple[str, ...] = ()  # folders that set-up packages would have made known
    has_numpy: bool = False  # the distribution's, because the package index has none

    @property
    def root(self) -> Path:
        """Its folder."""
        return BOARDS / self.name

    def __str__(self) -> str:
        return f"python{self.python}"


_BLAS = "usr/lib/arm-linux-gnueabihf"
BOOKWORM = Land("arm64-bookworm", "3.11", "aarch64")
TRIXIE = Land("arm64-trixie", "3.13", "aarch64")
BOOKWORM_32 = Land(
    "armhf-bookworm", "3.11", "armv7l", (f"{_BLAS}/blas", f"{_BLAS}/lapack"), has_numpy=True
)


def emulate(
    cpu: CPU,
    *command: str | Path,
    root: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program on a CPU, with nothing of this process's environment. root: the user land in
    which it finds its libraries. A signal shows as a negative return code."""
    qemu = BOARDS / "qemu" / "usr" / "bin" / f"qemu-{cpu.arch}"
    assert qemu.exists(), f"there is no {qemu}: run scripts/boards"
    where = () if root is None else ("-L", root)
    return subprocess.run(
        [qemu, "-cpu", cpu.name, *where, *command],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=BOARDS,  # not where `import edge` would find this machine's
        env={"LANG": "C.UTF-8", **(env or {})},
    )


def run_python(
    cpu: CPU, land: Land, site: Path, *arguments: str | Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the Python of a user land with a site-packages."""
    libraries = os.pathsep.join(str(land.root / folder) for folder in land.libraries)
    all_env = {"PYTHONPATH": str(site), "LD_LIBRARY_PATH": libraries, **(env or {})}
    program = land.root / "usr" / "bin" / f"python{land.python}"
    return emulate(cpu, program, *arguments, root=land.root, env=all_env)


def output_of(run: subprocess.CompletedProcess[str]) -> str:
    """What a program printed; its errors are in the failure when it failed."""
    assert run.returncode == 0, f"{run.args}: {run.returncode}\n{run.stdout}{run.stderr}"
    return run.stdout
