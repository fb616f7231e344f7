"""Regenerate tests/data/mixes.json: the types that llama.cpp's `llama-quantize` chooses.

    python tests/make_mixes.py PATH/TO/llama-quantize

For each model of MODELS and each mix, with and without an importance matrix: kind of tensor -> runs
of types over the layers, as "Q6_K*2 Q4_K*14"; {}: it refused. The files are headers of the right
shapes, without weights, and the program runs with --dry-run.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from arches import arch_of
from arches.common import Tiny
from tiny import metadata

from edge.quantizer.imatrix import Importance, InputSums
from edge.quantizer.standard import MIXES
from edge.quantizer.types import kind_of

DATA = Path(__file__).parent / "data" / "mixes.json"

WIDE = {"n_layers": 16, "dim": 256, "ffn": 512, "vocab": 512, "head_dim": 64}
MODELS = {
    "llama": Tiny(**WIDE, n_kv_heads=4),
    "llama-grouped": Tiny(**WIDE, n_heads=8, n_kv_heads=2, tied=False),
    "llama-narrow": Tiny(**WIDE | {"dim": 288, "ffn": 528}, n_kv_heads=4),  # blocks do not fit
    "llama-70b": Tiny(**WIDE | {"n_layers": 80}, n_kv_heads=2),
    "phi3": Tiny("phi3", **WIDE),
    "qwen2": Tiny("qwen2", **WIDE, n_heads=14, n_kv_heads=2),
    "gemma3": Tiny("gemma3", **WIDE, n_kv_heads=1, window=64),
    "experts-8": Tiny(**WIDE, tied=False, extra=(("llama.expert_count", 8),)),
    "experts-16": Tiny(**WIDE, extra=(("llama.expert_count", 16),)),
}


def write_shapes(path: Path, t: Tiny) -> Path:
    """A file with the model's metadata, and tensors of its shapes, all zeros."""
    writer = gguf.GGUFWriter(path, t.arch)
    extra = {f"{t.arch}.expert_used_count": 2} if t.get("expert_count") else {}
    for key, value in (metadata(t) | extra).items():
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    offset = 0
    for name, filling in arch_of(t.arch).tensors(t).items():
        shape = filling.shape if isinstance(filling, np.ndarray) else filling
        n_bytes = 4 * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype("f4"), n_bytes)
        offset += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 32 + offset)
    return path


def in_runs(types: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> type, as kind of tensor -> runs of types in the order of the tensors."""
    by_kind = dict[str, list[str]]()
    for name, kind in types.items():
        by_kind.setdefault(kind_of(name), []).append(kind)
    return {
        kind: " ".join(f"{t}*{len(list(run))}" for t, run in itertools.groupby(chosen))
        for kind, chosen in sorted(by_kind.items())
    }


def chosen(program: str, model: Path, mix: str, matrix: Path | None) -> dict[str, str]:
    """Tensor -> type, of the tensors whose type the program would change."""
    options = ["--imatrix", matrix] if matrix else []
    command = [program, *options, "--dry-run", model, mix]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no tensor type fallback" in done.stderr + done.stdout:
        return {}
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = re.findall(r"\] +(\S+) +- \[.*?MiB \((\w+)\)", done.stdout + done.stderr)
    return {name: kind.upper() for name, kind in lines}


def main(program: str) -> None:
    kept = dict[str, dict[str, dict[str, str]]]()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "matrix.gguf"
        ones = InputSums(np.ones((1, 256), np.float32), np.array([1]))
        Importance({"blk.0.attn_q.weight": ones}).write(matrix)
        for name, tiny in MODELS.items():
            model = write_shapes(Path(folder) / f"{name}.gguf", tiny)
            kept[name] = {}
            for mix, given in itertools.product(MIXES, (None, matrix)):
                if mix == "F32":
                    continue  # that of the source
                types = chosen(program, model, mix, given)
                kept[name][f"{mix} with importance" if given else mix] = in_runs(types)
    lines = json.dumps(kept).replace("}, ", "},\n")  # one for each mix
    DATA.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
