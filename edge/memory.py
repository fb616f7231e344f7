"""What memory the device really has to give."""

from __future__ import annotations

from edge.errors import MemoryBudgetError

__all__ = ["available", "require", "show"]

#: Address space, not memory, that the tokenizer's threads and their heaps reserve: under a limit
#: on it they would abort the process instead of raising an error.
_THREAD_ADDRESSES = 160 << 20


def available() -> int | None:
    """Bytes that can be had now without swapping: free memory, within the address-space limit.

    None where the system does not say (other than Linux).
    """
    limits = [limit for limit in (_free(), _address_space()) if limit is not None]
    return min(limits) if limits else None


def require(parts: dict[str, int], what: str, hint: str = "") -> None:
    """Raise MemoryBudgetError when the parts (bytes by name) are more than there is."""
    needed, budget = sum(parts.values()), available()
    if budget is not None and needed > budget:
        listed = ", ".join(f"{name} {show(size)}" for name, size in parts.items())
        raise MemoryBudgetError(
            f"{what} needs {show(needed)}, {show(budget)} are available: {listed}{hint}",
            needed=needed,
            budget=budget,
            parts=parts,
        )


def show(n_bytes: int) -> str:
    """Bytes for people: "1.2 GiB"."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def _free() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _address_space() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None
    return max(0, limit - used - _THREAD_ADDRESSES)
