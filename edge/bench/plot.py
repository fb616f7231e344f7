"""The roofline: how near each case came to the limits of memory and of the multipliers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge.bench.report import Report, roofs
from edge.errors import UnsupportedError
from edge.extras import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "require", "roofline"]

FORMATS = ("svg", "png")
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def require() -> None:
    """Raise UnsupportedError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UnsupportedError(f"a plot needs matplotlib: {install('bench')}", what="plot") from e


def roofline(reports: Sequence[Report], path: str | os.PathLike[str]) -> None:
    """Write the figure, as SVG or PNG by the name of the file.

    Each case of edge is a point at (multiply-adds per byte of weights read, GMAC/s), and each
    number of threads has its roofs.

    Raises UnsupportedError if matplotlib is not installed, OSError.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no choice of back end
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xlabel("multiply-adds per byte of weights read")
    axes.set_ylabel("GMAC/s")
    axes.grid(True, which="both", alpha=0.2)
    rows = [(r, row) for r in reports for row in r.rows if "macs_per_byte" in row]
    xs = [row["macs_per_byte"] for _, row in rows]
    span = (min(xs) / 3, max(xs) * 3)
    threads = sorted({m.threads for report in reports for m in report.measured})
    colours = {n: _COLOURS[i % len(_COLOURS)] for i, n in enumerate(threads)}
    for n in threads:
        _draw_roofs(axes, n, [roofs(m) for r in reports for m in r.measured], span, colours[n])
    for report, row in rows:
        point = row["macs_per_byte"], row["gmacs_per_second"]
        axes.plot(*point, "o", color=colours[row["threads"]])
        label = _label(report, row, len(reports))
        axes.annotate(label, point, (5, -4), textcoords="offset points")
    axes.legend(loc="lower right")
    figure.savefig(os.fspath(path))


def _draw_roofs(
    axes: Axes, threads: int, measured: list[Any], span: tuple[float, float], colour: str
) -> None:
    """Draw min(x * bandwidth, peak), of the best measured values."""
    own = [roof for roof in measured if roof["threads"] == threads]
    read, dot = (max(roof[key] for roof in own) / 1e9 for key in ("read", "dot"))
    low, high = span
    ridge = dot / read
    xs = sorted({low, min(max(ridge, low), high), high})
    name = f"{threads} thread{'s' * (threads > 1)}: {read:.0f} GB/s, {dot:,.0f} GMAC/s"
    axes.plot(xs, [min(x * read, dot) for x in xs], color=colour, label=name)


def _label(report: Report, row: dict[str, Any], n_reports: int) -> str:
    depth = f" at {row['depth']}" if row["depth"] else ""
    test = f"{row['test']} {row['tokens']}{depth}"
    stem = os.path.basename(report.model).removesuffix(".gguf")
    return f"{stem} {test}" if n_reports > 1 else test
