"""The cores of this machine, and on how many of them to compute.

Cores differ on phones, some boards and newer PCs; a cluster is a set of cores of one speed. The
rule is one thread for each core of the clusters that help: the fastest cluster, and every cluster
of 0.45 of its speed or more. Each stage of a token waits for its last chunk of work, so a small
core of a third of the speed costs more than it adds; but the one fastest core that many phones have
is slower alone than with the next three. Two CPUs of one core (two sets of registers) count once,
because the kernels keep the core's units busy. Where there are slower cores, the threads are
restricted to the clusters that help, or to more clusters when more threads are asked for. No thread
is bound to one core, because another program may need that core.

The speed of a core is the Linux kernel's `cpu_capacity`, which counts clock and kind, where cores
differ in it. Else it is the highest clock; that understates how much slower a small core is, so a
cluster needs 0.8 of it to help. Only CPUs that the process may run on count. A control group's
share of processor time, rounded up, limits the threads.

`edge-run tune` measures the best number on one machine. The number is kept in the cache folder and
used as long as the machine, the CPUs of the process and edge's version stay the same.
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
_SAME = 0.85  # of a cluster's fastest core: on PCs the clocks of equal cores differ by some percent
_HELPS_CAPACITY, _HELPS_CLOCK = 0.45, 0.8  # of the machine's fastest core
_LARGEST_FILE = 1 << 16  # bytes that are read of the file that `store` writes
_ROOT = "/sys/devices/system/cpu"


@dataclass(frozen=True)
class Cluster:
    """Cores of one speed. cpus: their numbers in the system; n_cores: how many cores these CPUs
    are; speed: of the cluster's fastest core, the machine's fastest core has 1; helps: whether to
    use the cluster by default.
    """

    cpus: tuple[int, ...]
    n_cores: int
    speed: float
    helps: bool


@dataclass(frozen=True)
class Cores:
    """The cores that this process may use. clusters: from the fastest down; share: how many
    processors' time the control group allows, None: all.
    """

    clusters: tuple[Cluster, ...]
    share: float | None

    @classmethod
    def now(cls) -> Cores:
        """The cores that this process may use right now."""
        return cls(tuple(_clusters_of_system()), _share())

    @property
    def n_cpus(self) -> int:
        """The most threads that can run at once."""
        n = sum(len(cluster.cpus) for cluster in self.clusters)
        return min(n, MOST) if self.share is None else min(n, MOST, max(1, math.ceil(self.share)))

    @property
    def n_cores(self) -> int:
        """The cores of all clusters."""
        return sum(cluster.n_cores for cluster in self.clusters)

    @property
    def n_helping(self) -> int:
        """The cores that are used by default."""
        return sum(cluster.n_cores for cluster in self.clusters if cluster.helps)

    def cpus(self, n_threads: int) -> tuple[int, ...]:
        """The CPUs that so many threads are restricted to: those of the clusters that help, and of
        more clusters for more threads; (): there is no restriction, or the system has none.
        """
        n_cores, chosen, rest = 0, list[int](), list(self.clusters)
        while rest and (rest[0].helps or n_cores < n_threads):
            n_cores += rest[0].n_cores
            chosen += rest.pop(0).cpus
        return tuple(sorted(chosen)) if rest and hasattr(os, "sched_setaffinity") else ()


@dataclass(frozen=True)
class Choice:
    """How many threads to run, on which CPUs ((): any), and why. ignored: why the number that
    `edge-run tune` stored was not used; None: it was used, or there is none.
    """

    threads: int
    cpus: tuple[int, ...]
    why: str
    ignored: str | None = None

    def lines(self, refused: str | None = None) -> list[str]:
        """The choice for people. refused: why the system did not keep the threads on the CPUs."""
        count = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = f", on CPUs {_ranges(self.cpus)}" if self.cpus else ""
        lines = [f"threads: {count}, {self.why}{where}"]
        if refused:
            lines[0] += f" (the system did not keep them there: {refused})"
        return lines + ([self.ignored] if self.ignored else [])


def choose(wanted: int | None = None, cores: Cores | None = None) -> Choice:
    """Choose the threads: EDGE_THREADS where it is set, else `wanted`, else the number that
    `edge-run tune` stored, else one for each core that helps.

    cores: None: this machine's. Warns of more threads than CPUs, and takes them. Raises InputError
    for a number that is not from 1 to 256.
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


# ---- facts of the system ---------------------------------------------------------------------


def _clusters_of_system() -> list[Cluster]:
    if hasattr(os, "sched_getaffinity"):  # it names no CPU that is offline
        return clusters(sorted(os.sched_getaffinity(0)))
    n, fast = os.cpu_count() or 1, _sysctl("hw.perflevel0.logicalcpu") or 0
    if not 0 < fast < n:
        return [Cluster(tuple(range(n)), n, 1.0, True)]
    slow = tuple(range(fast, n))
    return [Cluster(tuple(range(fast)), fast, 1.0, True), Cluster(slow, n - fast, 0.5, False)]


def clusters(cpus: Sequence[int], root: str = _ROOT) -> list[Cluster]:
    """The clusters of these CPUs, from the fastest down; one where the system does not say."""
    speeds, least = _speeds(cpus, root)
    best, groups = max(speeds), list[list[int]]()
    order = sorted(range(len(cpus)), key=lambda i: (-speeds[i], cpus[i]))
    for i in order:
        if not groups or speeds[i] < _SAME * speeds[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    result = []
    for members in groups:
        own = sorted(cpus[i] for i in members)
        names = {_text(f"{root}/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in own}
        speed = speeds[members[0]] / best
        result.append(Cluster(tuple(own), len(names), speed, speed >= least))
    return result


def _speeds(cpus: Sequence[int], root: str) -> tuple[list[int], float]:
    """(a number for each CPU, the share of the best number from which on a CPU helps). Files are
    opened by name, because Android does not list the folder.
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
    """How many processors' time the control group and its parents allow; None: no limit."""
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
    """The text of a small file; "" where it is missing or cannot be read."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(4096).strip()
    except (OSError, ValueError):
        return ""


def _sysctl(name: str) -> int | None:
    """A number that macOS gives by this name; None: it has no such number, or this is no macOS."""
    if sys.platform not in ("darwin", "ios"):
        return None
    value = ctypes.c_int32(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    call = ctypes.CDLL(None).sysctlbyname
    status = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return value.value if status == 0 else None


def cpu_name(info: str = "/proc/cpuinfo") -> str:
    """The name of the board or the CPU, and the number of CPUs, as the system gives them."""
    values: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path(info).read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            values.setdefault(key.strip(), value.strip())
    names = (values.get(key) for key in ("Model", "Hardware", "model name"))
    name = next(filter(None, names), None) or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} CPUs"


# ---- the number that `edge-run tune` measured ------------------------------------------------


def store(n_threads: int, cores: Cores) -> Path:
    """Store the best number of threads for `choose`; returns the file's path.

    Raises OSError, UnsupportedError when there is no home folder.
    """
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, ".threads-") as file:
        file.write(json.dumps({"machine": _identity(cores), "threads": n_threads}).encode())
    return path


def _tuned(cores: Cores) -> tuple[int | None, str | None]:
    """(the stored number, why a stored number cannot be used); (None, None): none is stored."""
    try:
        path = _path()
        with open(path, "rb") as file:
            content = json.loads(file.read(_LARGEST_FILE))
        n, is_ours = content["threads"], content["machine"] == _identity(cores)
    except (FileNotFoundError, NotADirectoryError, UnsupportedError):
        return None, None
    except OSError as e:
        return None, _ignored(path, f"cannot be read: {e.strerror}")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, _ignored(path, "is damaged")
    if not is_ours:
        return None, _ignored(path, "is of another machine, other cores or another version")
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= cores.n_cpus:
        return None, _ignored(path, "is damaged")
    return n, None


def _ignored(path: Path, why: str) -> str:
    return f"{path} {why}, and is not used: `edge-run tune` makes it anew"


def _path() -> Path:
    return cache_dir() / "threads.json"


def _identity(cores: Cores) -> Any:
    """The facts that the number depends on, as JSON gives them back."""
    isa = os.environ.get("EDGE_ISA", "")
    facts = {"cpu": cpu_name(), "edge": __version__, "isa": isa, **asdict(cores)}
    return json.loads(json.dumps(facts))
