#!/bin/sh
# ggml's quantiser of IQ3_S damages a block in which a group of 32 weights is zero.
#
# A block of IQ3_S has eight groups. For a group of zeros the quantiser goes on with the next group
# without moving on in the block's indices and signs, so all groups behind it land one place early:
# their scales are right, their weights are those of the group after them. Pruned models, and rows
# that were padded with zeros, have such groups. An importance matrix does not help.
#
# Seen: libgguf 0.2.2, which is ggml's quantisers; llama.cpp b11434 has the same lines.
#   relative square error of a block of normal weights: 0.018
#   the same block with weights 32 to 63 zero: 1.910
#   groups 1 to 6 then correlate with the weights of the group behind by 0.5 and more
# Exits 0 while this is so.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check libgguf==0.2.2 numpy
cat >"$work/show.py" <<'PY'
import sys

import libgguf
import numpy as np

IQ3_S = 21


def rounded(x):
    blocks = libgguf.quantize_rows_raw(IQ3_S, x, 1, 256, np.ones(256, np.float32))
    blocks = np.frombuffer(blocks, np.uint8)
    return np.frombuffer(libgguf.dequantize_rows_raw(IQ3_S, blocks, 1, 256), np.float32)


def error(x):
    return float(((rounded(x) - x[0]) ** 2).sum() / (x**2).sum())


x = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
whole = error(x)
x[0, 32:64] = 0
holed = error(x)
groups, values = x.reshape(8, 32), rounded(x).reshape(8, 32)
behind = [float(np.corrcoef(values[i], groups[i + 1])[0, 1]) for i in range(1, 7)]
print(f"relative square error of a block of normal weights: {whole:.3f}")
print(f"the same block with weights 32 to 63 zero: {holed:.3f}")
print("groups 1 to 6 with the group behind:", *(f"{r:.2f}" for r in behind))
sys.exit(not (whole < 0.05 and holed > 1 and min(behind) > 0.5))
PY
"$work/venv/bin/python" "$work/show.py" || { echo "not as it was" >&2; exit 1; }
echo "still so"
