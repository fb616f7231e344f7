"""Write docs/models.md from the tables of the program and of the tests.

    python tests/make_models_page.py

A test compares the page with what this writes today.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from arches import CASES
from native_plan import described
from test_onnx_archs import LACKS_CPU, LACKS_NPU

from edge import native
from edge.files.tensor_types import TENSOR_TYPES
from edge.models import architectures
from edge.native import lib
from edge.weights.weights import supported_types

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
TEXT = """\
# Models and weight types

Tests hold every line of this page; `python tests/make_models_page.py` writes it.

## Architectures

`general.architecture` of a file names its architecture. An architecture is one file in
`edge/models/`, which describes it as a graph; the native engine, the exporter to ONNX and the
referee in numpy read the same graph.

Each case is a tiny random model with everything that the architecture may have (biases, windows,
softcaps, several rotary embeddings). It is compared in four ways:

- with `transformers` 5.23: the logits of the referee and of the native engine differ by less than
  0.001, in float32 and with keys and values in float16 on both sides;
- with itself: the native engine gives the same bits on every instruction set, with 1 to 3 threads
  and in pieces of any size;
- in ONNX, dialects `cpu` and `npu`: as the referee, by less than 0.001. "-" means that the dialect
  lacks something; exporting says what;
- for the keys of its metadata: each that changes the arithmetic is read, or the file is refused. A
  key that no code knows is named in a warning.

{architectures}

## Weight types

In any mix, as embedding and output head, too. Unpacking a packed tensor gives the bits of the
format's reference dequantisation. "In memory": bits of a weight in the layout that is fast, and in
the compact one where there is another; a type's own file has "bits".

{types}
"""


def table(rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown; the first row is its head."""
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *others])


def summary_of(arch: str) -> str:
    """The first sentence of an architecture's file."""
    text = importlib.import_module(f"edge.models.{arch.replace('-', '_')}").__doc__ or ""
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def architecture_rows() -> list[tuple[str, ...]]:
    """A row for each architecture."""
    rows: list[tuple[str, ...]] = [("name", "models", "cases", "ONNX cpu", "ONNX npu")]
    for arch in architectures():
        names = [name for name, case in CASES.items() if case.model.arch == arch]
        marks = [
            "yes" if not lacking else "-" if len(lacking) == len(names) else "in part"
            for lacking in ([n for n in names if n in lacks] for lacks in (LACKS_CPU, LACKS_NPU))
        ]
        rows.append((f"`{arch}`", summary_of(arch), ", ".join(names), *marks))
    return rows


def type_rows() -> list[tuple[str, ...]]:
    """A row for each type that runs."""
    rows: list[tuple[str, ...]] = [("type", "bits", "in memory", "layout")]
    kinds = {kind.name: kind for kind in TENSOR_TYPES.values()}
    for name in supported_types():
        kind = kinds[name]
        bits, layouts = [], []
        for form in ("fast", "compact"):
            entry = described(name, 16, 512, form).entry
            layout = native.text(lib.edge_layout_name(entry.layout))
            if layout not in layouts:
                layouts.append(layout)
                bits.append(f"{entry.n_bytes * 8 / (16 * 512):.2f}")
        per_weight = f"{kind.block_bytes * 8 / kind.block:.2f}"
        rows.append((name, per_weight, ", ".join(bits), ", ".join(layouts)))
    return rows


def page() -> str:
    """The whole page."""
    return TEXT.format(architectures=table(architecture_rows()), types=table(type_rows()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
