"""Size against divergence from the base: a curve for each recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence

from edge.bench.plot import require
from edge.errors import InputError
from edge.evaluate.table import Evaluation

__all__ = ["draw", "require"]


def draw(evaluations: Sequence[Evaluation], path: str | os.PathLike[str]) -> None:
    """Write the picture, as SVG or PNG by the name of the file.

    Each file is a point at (megabytes, mean KL divergence); the second axis is logarithmic. Files
    of one recipe are joined. The base, and files that do not differ from it, are left out.

    Raises UnsupportedError if matplotlib is not installed, InputError if no point is left, OSError.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = dict[str, list[tuple[float, float, str]]]()
    for e in evaluations:
        if e.divergence is not None and e.divergence.kl > 0:
            name = os.path.basename(e.facts.path).removesuffix(".gguf")
            point = (e.facts.n_bytes / 1e6, e.divergence.kl, name)
            curves.setdefault(e.facts.recipe, []).append(point)
    if not curves:
        raise InputError(f"{os.fspath(path)}: no file differs from the base, nothing can be drawn")
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)  # no window, no choice of back end
    axes = figure.add_subplot(yscale="log")
    axes.set_xlabel("size (MB)")
    axes.set_ylabel("mean KL divergence from the base (nats)")
    axes.grid(True, which="both", alpha=0.2)
    axes.margins(x=0.15)  # room for names
    for recipe, points in curves.items():
        xs, ys, names = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, "o-", label=recipe)
        for x, y, name in zip(xs, ys, names, strict=True):
            axes.annotate(name, (x, y), (5, 4), textcoords="offset points", parse_math=False)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # a name is no formula
    figure.savefig(os.fspath(path))
