"""The cores of this machine, and on how many of them to compute.

Cores differ on phones, some boards and newer PCs: a cluster is cores of one speed. The rule: one
thread for each core of the clusters that help, which are the fastest and those of 0.45 of its speed
or more. A stage of a token waits for its last chunk of work, and who finishes that opens the next
stage, so a small core of a third of the speed takes more than it brings; but the one fastest core
that many phones have is better with the next three than alone. Two CPUs that are one core with two
sets of registers count once: the kernels keep its units busy. Where there are slower cores, threads
are restricted to those that help (to more clusters, when more threads are asked for); not each to
one core, which another program may need.

Speed is the kernel's `cpu_capacity`, which knows clock and kind, where it differs; else the highest
clock, which understates how much slower a small core is, so that 0.8 of it is asked for. Only CPUs
that the process may run on count, and a control group's share of processor time, rounded up, is the
most threads.

`edge-run tune` measures what is better on one machine. Its number is kept in the cache folder and
used as long as the machine, the CPUs that may be used and edge's version stay the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge import check
from edge.device.memory import control_groups
from edge.disk.atomic import replacing
from edge.disk.room import cache_dir
from edge.errors import EdgeWarning, InputError, UnsupportedError
from edge.version import __version__

__all__ = ["MOST", "Choice", "Cluster", "Cores", "choose", "cpu_name", "store"]

MOST = 256  # threads of an engine
_SAME = 0.85  # of a cluster's fastest core: PCs give equal cores clocks that differ by some percent
_HELPS_CAPACITY, _HELPS_CLOCK = 0.45, 0.8  # of the machine's fastest core
_LARGEST_FILE = 1 << 16  # bytes of what `store` wrote
_ROOT = "/sys/devices/system/cpu"


@dataclass(frozen=True)
class Cluster:
    """Cores of one speed. cpus: as the system counts them; n_cores: how many cores these are;
    speed: the fastest one's, 1 is that of the machine's; helps: whether to use it by default.
    """

    cpus: tuple[int, ...]
    n_cores: int
    speed: float
    helps: bool


@dataclass(frozen=True)
class Cores:
    """What this process may use. clusters: from the fastest down; share: processors that a control
    group allows, None: all.
    """

    clusters: tuple[Cluster, ...]
    share: float | None

    @classmethod
    def now(cls) -> Cores:
        """As it is right now."""
        return cls(tuple(_clusters_of_system()), _share())

    @property
    def n_cpus(self) -> int:
        """Most threads that can run at once."""
        n = sum(len(cluster.cpus) for cluster in self.clusters)
        return min(n, MOST) if self.share is None else min(n, MOST, max(1, math.ceil(self.share)))

    @property
    def n_cores(self) -> int:
        """Cores, of all clusters."""
        return sum(cluster.n_cores for cluster in self.clusters)

    @property
    def n_helping(self) -> int:
        """Cores that are used by default."""
        return sum(cluster.n_cores for cluster in self.clusters if cluster.helps)

    def cpus(self, n_threads: int) -> tuple[int, ...]:
        """Those that so many threads stay on: of the clusters that help, and of more when there
        are more threads; (): all, or the system has no such thing.
        """
        n_cores, kept, left = 0, list[int](), list(self.clusters)
        while left and (left[0].helps or n_cores < n_threads):
            n_cores += left[0].n_cores
            kept += left.pop(0).cpus
        return tuple(sorted(kept)) if left and hasattr(os, "sched_setaffinity") else ()


@dataclass(frozen=True)
class Choice:
    """How many threads, on which CPUs ((): any), and why so. ignored: why `edge-run tune`'s number
    was not used, where there is one.
    """

    threads: int
    cpus: tuple[int, ...]
    why: str
    ignored: str | None = None

    def lines(self, refused: str | None = None) -> list[str]:
        """For people. refused: why the system did not keep the threads there."""
        count = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = f", on CPUs {_ranges(self.cpus)}" if self.cpus else ""
        lines = [f"threads: {count}, {self.why}{where}"]
        if refused:
            lines[0] += f" (the system did not keep them there: {refused})"
        return lines + ([self.ignored] if self.ignored else [])


def choose(wanted: int | None = None, cores: Cores | None = None) -> Choice:
    """EDGE_THREADS where it is set, else `wanted`, else what `edge-run tune` found, else the cores
    that help. cores: None: this machine's. More threads than CPUs are taken, with a warning.

    Raises InputError for a number that is not from 1 to 256.
    """
    cores = cores or Cores.now()
    setting = os.environ.get("EDGE_THREADS")
    if wanted is not None:
        wanted = check.whole("threads", wanted, 1, MOST)
    if setting:
        if not setting.isdecimal() or len(setting) > 9 or not 1 <= int(setting) <= MOST:
            raise InputError(f"EDGE_THREADS={setting[:40]} is not a number from 1 to {MOST}")
        wanted = int(setting)
    if wanted is not None:
        if wanted > cores.n_cpus:
            cpus = "1 CPU" if cores.n_cpus == 1 else f"{cores.n_cpus} CPUs"
            warnings.warn(
                f"{wanted} threads on {cpus}: they wait for each other, fewer are faster",
                EdgeWarning,
                stacklevel=2,
            )
        return Choice(wanted, cores.cpus(wanted), "by EDGE_THREADS" if setting else "as asked")
    tuned, ignored = _tuned(cores)
    if tuned is not None:
        return Choice(tuned, cores.cpus(tuned), "by edge-run tune")
    n, n_cores = cores.n_helping, cores.n_cores
    why = f"the {n} fastest of {n_cores} cores" if n < n_cores else f"all {n} cores"
    if cores.share is not None and cores.n_cpus < n:
        why = f"the control group's share of {cores.share:g} processors"
    n = min(n, cores.n_cpus)
    return Choice(n, cores.cpus(n), "the only core" if n_cores == 1 else why, ignored)


def _ranges(cpus: Sequence[int]) -> str:
    """`0-3,6` for sorted numbers."""
    parts: list[list[int]] = []
    for cpu in cpus:
        if parts and cpu == parts[-1][-1] + 1:
            parts[-1].append(cpu)
        else:
            parts.append([cpu])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)


# ---- what the system says --------------------------------------------------------------------


def _clusters_of_system() -> list[Cluster]:
    if hasattr(os, "sched_getaffinity"):  # which has none that are offline
        return clusters(sorted(os.sched_getaffinity(0)))
    n, fast = os.cpu_count() or 1, _sysctl("hw.perflevel0.logicalcpu") or 0
    if not 0 < fast < n:
        return [Cluster(tuple(range(n)), n, 1.0, True)]
    slow = tuple(range(fast, n))
    return [Cluster(tuple(range(fast)), fast, 1.0, True), Cluster(slow, n - fast, 0.5, False)]


def clusters(cpus: Sequence[int], root: str = _ROOT) -> list[Cluster]:
    """The clusters of these CPUs, from the fastest down; one, where the system does not tell."""
    speeds, least = _speeds(cpus, root)
    best, found = max(speeds), list[list[int]]()
    order = sorted(range(len(cpus)), key=lambda i: (-speeds[i], cpus[i]))
    for i in order:
        if not found or speeds[i] < _SAME * speeds[found[-1][0]]:
            found.append([])
        found[-1].append(i)
    result = []
    for members in found:
        own = sorted(cpus[i] for i in members)
        names = {_text(f"{root}/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in own}
        speed = speeds[members[0]] / best
        result.append(Cluster(tuple(own), len(names), speed, speed >= least))
    return result


def _speeds(cpus: Sequence[int], root: str) -> tuple[list[int], float]:
    """A number for each CPU, and the share of the best that makes one help. Files are asked for
    by name: Android does not list the folder.
    """
    for name, least in (
        ("cpu_capacity", _HELPS_CAPACITY),
        ("cpufreq/cpuinfo_max_freq", _HELPS_CLOCK),
    ):
        texts = [_text(f"{root}/cpu{cpu}/{name}") for cpu in cpus]
        numbers = [int(text) for text in texts if text.isdecimal() and 0 < len(text) < 12]
        if len(numbers) == len(cpus) and min(numbers) > 0 and len(set(numbers)) > 1:
            return numbers, least
    return [1] * len(cpus), 1


def _share(root: str = "/sys/fs/cgroup") -> float | None:
    """Processors' worth of time that the control group and its parents allow; None: no limit."""
    shares = []
    for folder, is_v2 in control_groups("cpu", root):
        if is_v2:
            words = _text(f"{folder}/cpu.max").split()
        else:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            words = [_text(f"{folder}/{name}") for name in names]
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            shares.append(int(words[0]) / int(words[1]))
    return min(shares, default=None)


def _text(path: str) -> str:
    """What a small file says; "" where there is none, or it may not be read."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(4096).strip()
    except (OSError, ValueError):
        return ""


def _sysctl(name: str) -> int | None:
    """A number that macOS tells."""
    if sys.platform not in ("darwin", "ios"):
        return None
    value = ctypes.c_int32(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    call = ctypes.CDLL(None).sysctlbyname
    status = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return value.value if status == 0 else None


def cpu_name(info: str = "/proc/cpuinfo") -> str:
    """The board's name or the CPU's, and how many CPUs there are, as the system tells them."""
    told: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path(info).read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            told.setdefault(key.strip(), value.strip())
    known = (told.get(key) for key in ("Model", "Hardware", "model name"))
    name = next(filter(None, known), None) or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"


# ---- what was measured -----------------------------------------------------------------------


def store(n_threads: int, cores: Cores) -> Path:
    """Keep the best number of threads, for `choose`; returns where.

    Raises OSError, UnsupportedError when there is no home folder.
    """
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, ".threads-") as file:
        file.write(json.dumps({"machine": _identity(cores), "threads": n_threads}).encode())
    return path


def _tuned(cores: Cores) -> tuple[int | None, str | None]:
    """The number that is kept, or why there is one that cannot be used."""
    try:
        path = _path()
        with open(path, "rb") as file:
            content = json.loads(file.read(_LARGEST_FILE))
        n, belongs = content["threads"], content["machine"] == _identity(cores)
    except (FileNotFoundError, NotADirectoryError, UnsupportedError):
        return None, None
    except OSError as e:
        return None, _ignored(path, f"cannot be read: {e.strerror}")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, _ignored(path, "is damaged")
    if not belongs:
        return None, _ignored(path, "is of another machine, other cores or another version")
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= cores.n_cpus:
        return None, _ignored(path, "is damaged")
    return n, None


def _ignored(path: Path, why: str) -> str:
    return f"{path} {why}, and is not used: `edge-run tune` makes it anew"


def _path() -> Path:
    return cache_dir() / "threads.json"


def _identity(cores: Cores) -> Any:
    """What the number depends on, as JSON gives it back."""
    isa = os.environ.get("EDGE_ISA", "")
    facts = {"cpu": cpu_name(), "edge": __version__, "isa": isa, **asdict(cores)}
    return json.loads(json.dumps(facts))
