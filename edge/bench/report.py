"""The results as rows: medians and spreads, shares of the roofs, ratios to peers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from edge.bench.rounds import Measurement, Outcome, Settings
from edge.device.cores import cpu_name
from edge.sizes import show

__all__ = ["Report", "Row"]

Row = dict[str, Any]
_GIGA = 1e9


class Report:
    """The results of `rounds.measure`.

    rows: one per number of threads, runtime and case, with these keys:
      threads, runtime ("edge" or the peer's name), test ("prompt", "decode"), tokens, depth
      tokens_per_second: of each round; median, min, max: of all rounds; or error: why there is
        no speed
    rows of edge also, unless onnxruntime does the work:
      gmacs_per_second: multiply-adds with weights; gigabytes_per_second: packed weights read;
      peak_share, bandwidth_share: of the int8 peak and of the read bandwidth, which are measured
        between the rounds;
      macs_per_byte; cache_bytes: keys and values that a decoded token reads as well
    rows of peers also:
      ratios: edge's speed over the peer's, of each round; ratio, ratio_min, ratio_max
    """

    def __init__(self, model: str, measured: Sequence[Measurement], settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.measured = list(measured)
        self.rows = [row for measurement in self.measured for row in _rows(measurement, settings)]

    def json(self) -> Row:
        """The report as JSON values.

        Sizes are in bytes; roofs in bytes and multiply-adds per second, one for each number of
        threads.
        """
        first = self.measured[0]
        return {
            "model": self.model,
            "cpu": cpu_name(),
            "isa": first.isa,
            "packed_bytes": first.weight_bytes,
            "kv": first.kv,
            "builds": self.builds(),
            "rounds": self.settings.rounds,
            "roofs": [roofs(measurement) for measurement in self.measured],
            "results": self.rows,
        }

    def builds(self) -> dict[str, str]:
        """Runtime -> its version and the instruction sets that it was compiled for."""
        outcomes = [(name, o) for measurement in self.measured for name, o in _flat(measurement)]
        return {name: o.build for name, o in outcomes if o.error is None}

    def lines(self) -> list[str]:
        """The table for people."""
        first = self.measured[0]
        weights = f"{'packed weights' if first.work else 'weights'} {show(first.weight_bytes)}"
        kv = f"keys and values {first.kv}"
        lines = [f"{self.model}: kernels {first.isa}, {weights}, {kv}"]
        for measurement in self.measured:
            roof, threads = roofs(measurement), _threads(measurement.threads)
            lines.append(
                f"this machine, {threads}: reads {roof['read'] / _GIGA:.1f} GB/s "
                f"({roof['read_min'] / _GIGA:.1f} to {roof['read_max'] / _GIGA:.1f}), int8 peak "
                f"{roof['dot'] / _GIGA:,.0f} GMAC/s"
            )
        peers = {n: b for n, b in self.builds().items() if n != "edge"}
        lines += [f"{name}: {build}" for name, build in peers.items()]
        named = [f"{row['runtime']:<{self._width()}}" if peers else "" for row in self.rows]
        head = " " * len(named[0])
        lines.append(
            f"{'test':<20}{head}{'threads':>8}{'median':>12}{'min':>12}{'max':>12} tokens/s"
        )
        for row, name in zip(self.rows, named, strict=True):
            lines.append(f"{_test(row):<20}{name}{row['threads']:>8}{_figures(row)}")
        return lines

    def _width(self) -> int:
        return max(len(row["runtime"]) for row in self.rows) + 1


def roofs(measurement: Measurement) -> Row:
    """The roofs as a row: threads; read and dot: medians, in bytes and multiply-adds per second;
    read_min, read_max, dot_min, dot_max.
    """
    row: Row = {"threads": measurement.threads}
    for name in ("read", "dot"):
        values = [getattr(roof, name) for roof in measurement.roofs]
        row |= {name: statistics.median(values)}
        row |= {f"{name}_min": min(values), f"{name}_max": max(values)}
    return row


def _flat(measurement: Measurement) -> list[tuple[str, Outcome]]:
    return [(name, o) for name, outcomes in measurement.rounds.items() for o in outcomes]


def _rows(measurement: Measurement, settings: Settings) -> list[Row]:
    rows = []
    names = ["edge", *(peer.name for peer in settings.peers)]
    for i, case in enumerate(settings.cases):
        for name in names:
            row: Row = {"threads": measurement.threads, "runtime": name, "test": case.kind}
            row |= {"tokens": case.tokens, "depth": case.depth}
            outcomes = [o for o in measurement.rounds[name] if o.error is None]
            if outcomes:
                row |= _speeds([o.speeds[i] for o in outcomes])
                if name != "edge":
                    row |= _ratios(measurement, name, i)
                elif measurement.work:
                    row |= _against_machine(measurement, i, row)
            else:
                row["error"] = measurement.rounds[name][0].error
            rows.append(row)
    return rows


def _speeds(speeds: list[float]) -> Row:
    spread = {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}
    return {**spread, "tokens_per_second": speeds}


def _against_machine(measurement: Measurement, i: int, row: Row) -> Row:
    work, roof = measurement.work[i], roofs(measurement)
    dots, reads = row["median"] * work.macs, row["median"] * work.bytes
    return {
        "gmacs_per_second": dots / _GIGA,
        "peak_share": dots / roof["dot"],
        "gigabytes_per_second": reads / _GIGA,
        "bandwidth_share": reads / roof["read"],
        "macs_per_byte": work.macs / work.bytes,
        "cache_bytes": work.cache_bytes,
    }


def _ratios(measurement: Measurement, name: str, i: int) -> Row:
    pairs = zip(measurement.rounds["edge"], measurement.rounds[name], strict=True)
    ratios = [ours.speeds[i] / peer.speeds[i] for ours, peer in pairs if peer.error is None]
    extremes = {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return {"ratio": statistics.median(ratios), **extremes, "ratios": ratios}


def _threads(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"


def _test(row: Row) -> str:
    depth = f" at {row['depth']}" if row["depth"] else ""
    return f"{row['test']} {row['tokens']}{depth}"


def _figures(row: Row) -> str:
    if "error" in row:
        return f"  {row['error']}"
    speeds = "".join(f"{row[key]:12,.1f}" for key in ("median", "min", "max"))
    if "ratio" in row:
        low, high = row["ratio_min"], row["ratio_max"]
        return f"{speeds}   edge is {row['ratio']:.2f} x as fast ({low:.2f} to {high:.2f})"
    if "peak_share" not in row:
        return speeds
    if row["test"] == "decode":
        share = f"{row['bandwidth_share']:.0%} of the read bandwidth"
        return f"{speeds}   {row['gigabytes_per_second']:.1f} GB/s, {share}"
    share = f"{row['peak_share']:.0%} of the int8 peak"
    return f"{speeds}   {row['gmacs_per_second']:,.0f} GMAC/s, {share}"
