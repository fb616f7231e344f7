"""The memory that the device can really give."""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Iterator

from edge.sizes import show

__all__ = [
    "anonymous",
    "available",
    "control_groups",
    "peak",
    "resident",
    "resident_of",
]

#: Address space, not memory, that the tokenizer's threads and their heaps reserve. Without it,
#: under a limit on address space, they would abort the process instead of raising an error.
_THREAD_ADDRESSES = 160 << 20

#: Stacks of threads, of 8 MiB each: under a limit on data, a whole stack counts from its start.
_THREAD_DATA = 64 << 20

_POINTER_BYTES = struct.calcsize("P")


def available() -> int | None:
    """Bytes that are available now without swapping: free memory, within the limits on the control
    group, on the address space and on data. None: the system does not say (only Linux does).
    """
    limits = (_free(), _control_group(), _address_space(), _data())
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def resident() -> int | None:
    """Bytes of memory that this process has right now; None: the system does not say."""
    return _status("VmRSS:")


def peak() -> int | None:
    """The most bytes of memory that this process ever had; None: the system does not say."""
    if (high_water := _status("VmHWM:")) is not None:
        return high_water
    try:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except ImportError:
        return None
    return most if sys.platform == "darwin" else most * 1024


#: The last byte of an entry of /proc/self/pagemap -> whether the page is present.
_PRESENT = bytes(byte >> 7 for byte in range(256))


def resident_of(address: int, n_bytes: int) -> int | None:
    """Bytes of the pages of this range that are in memory; None: the system does not say."""
    first, end = address // mmap.PAGESIZE, -(-(address + n_bytes) // mmap.PAGESIZE)
    n_present = 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            while first < end:
                entries = pagemap.read(8 * min(end - first, 1 << 13))
                if not entries:
                    return None
                n_present += entries[7::8].translate(_PRESENT).count(1)
                first += len(entries) // 8
    except OSError:
        return None
    return n_present * mmap.PAGESIZE


def anonymous(n_bytes: int, *, huge: bool = True) -> mmap.mmap:
    """Zeroed memory that is given back on close. huge: in huge pages where the system has them.

    It is private, because shared memory gets no huge pages. Raises OSError, MemoryError.
    """
    if n_bytes > sys.maxsize:  # with 32 bits, where mmap raises errors of other types
        raise MemoryError(f"{show(n_bytes)} in one piece")
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, n_bytes)
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return block


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; None: there is none."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            for line in lines:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _free() -> int | None:
    """Bytes that the system can give without swapping; None: it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def control_groups(controller: str, root: str = "/sys/fs/cgroup") -> Iterator[tuple[str, bool]]:
    """(folder, whether it is of version 2, not 1) of this process's control group and its parents,
    for one controller.
    """
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as lines:
            groups = [line.rstrip("\n").split(":", 2) for line in lines]
    except OSError:
        return
    for number, controllers, group in groups:
        if number == "0":
            folder = root + group
        elif controller in controllers.split(","):
            folder = f"{root}/{controller}{group}"
        else:
            continue
        while folder.startswith(root):
            yield folder, number == "0"
            folder = folder.rpartition("/")[0]


def _control_group(root: str = "/sys/fs/cgroup") -> int | None:
    """Bytes that the control group (version 2 or 1) and its parents still allow; None: no limit."""
    remaining: list[int] = []
    for folder, is_v2 in control_groups("memory", root):
        version_1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
        names = ("memory.max", "memory.current") if is_v2 else version_1
        limit, used = (_read_number(f"{folder}/{name}") for name in names)
        if limit is not None and used is not None:
            remaining.append(max(0, limit - used + _reclaimable(folder)))
    return min(remaining, default=None)


def _read_number(path: str) -> int | None:
    """The number in a file; None: the file says "max", or there is no such file."""
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _reclaimable(folder: str) -> int:
    """Bytes of cached files, which count as used but are freed when memory is needed. Files that
    were used more than once (active), such as packed weights of the last run, belong to them.
    Version 1 has other names (`total_...`) for the sums with the groups below.
    """
    try:
        with open(f"{folder}/memory.stat", encoding="ascii") as lines:
            stat = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        return 0
    kinds = ("inactive_file", "active_file")
    return sum(stat.get(f"total_{kind}", stat.get(kind, 0)) for kind in kinds)


def _address_space() -> int | None:
    """Free addresses, in bytes, under a limit or where pointers have 32 bits; None: no limit."""
    remaining: list[int] = []
    if _POINTER_BYTES == 4:
        remaining.append(_addresses_of_32_bits())
    limit, used = _limit("RLIMIT_AS"), _status("VmSize:")
    if limit is not None and used is not None:
        remaining.append(limit - used)
    return max(0, min(remaining) - _THREAD_ADDRESSES) if remaining else None


def _data() -> int | None:
    """Bytes that remain of a limit on data (all private writable memory); None: no limit."""
    limit, used = _limit("RLIMIT_DATA"), _status("VmData:")
    return None if limit is None or used is None else max(0, limit - used - _THREAD_DATA)


def _limit(name: str) -> int | None:
    """A limit of this process; None: there is none."""
    try:
        import resource

        limit = resource.getrlimit(getattr(resource, name))[0]
    except (ImportError, AttributeError, OSError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit


def _addresses_of_32_bits(maps: str = "/proc/self/maps") -> int:
    """Free addresses below the stack, in bytes, at most sys.maxsize. The stack ends at 2, 3 or
    4 GiB, and the kernel's addresses begin behind it. Where the system does not say, 1 GiB: every
    kernel gives that much.
    """
    used = 0
    try:
        with open(maps, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                first, end = (int(x, 16) for x in line.split(maxsplit=1)[0].split("-"))
                used += end - first
                if line.rstrip().endswith("[stack]"):
                    return min(end - used, sys.maxsize)
    except (OSError, ValueError):
        pass
    return 1 << 30
