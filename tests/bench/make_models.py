"""Write the Q4_0 and Q8_0 files of a model that the benchmarks compare.

    python tests/bench/make_models.py model-Q4_1.gguf OUT_DIR [--types Q4_0 Q8_0]

Metadata is copied as it is, except for the file type. The matrices of the layers (`blk.*`, two
dimensions) are dequantised and quantised anew with the `gguf` package's reference code; all other
tensors (embedding, norms) keep their bytes. A file made from a 4-bit one is for timing, not for
judging quality.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

FILE_TYPES = {
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, file_type: LlamaFileType) -> None:
    """Copy every key of the source but its header fields, the architecture and the file type."""
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_file_type(file_type)


def requantise(source: Path, target: Path, type_name: str) -> Counter[str]:
    """Write `source` to `target` with its layer matrices as `type_name`; counts tensors by type."""
    reader = GGUFReader(source)
    wanted = GGMLQuantizationType[type_name]
    arch = reader.fields["general.architecture"].contents()
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, arch)
    copy_metadata(reader, writer, FILE_TYPES[type_name])
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and kind != wanted:
            weights = dequantize(data, kind).astype(np.float32, copy=False)
            data, kind = quantize(weights, wanted), wanted
        writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=kind)
        counts[kind.name] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)
    return counts


def main() -> None:
    """Parse the command line and write one file per type."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--types", nargs="+", choices=sorted(FILE_TYPES), default=["Q4_0", "Q8_0"])
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for type_name in args.types:
        target = args.out_dir / f"{args.source.stem}-{type_name.lower()}.gguf"
        counts = requantise(args.source, target, type_name)
        kinds = ", ".join(f"{kind} x{count}" for kind, count in sorted(counts.items()))
        print(f"{target}: {target.stat().st_size:,} bytes, {kinds}")


if __name__ == "__main__":
    main()
