#!/bin/sh
# With an importance matrix that is zero for nearly all columns of a block, ggml's quantiser of Q2_K
# can lose the few columns that count.
#
# The weighted fit of a group of 16 weights may then give a negative scale. A block stores its
# groups' scales as integers without a sign, and this one wraps. Such importance is not made up: the
# inputs of a down projection behind ReLU are zero for most columns, and an expert that saw few
# tokens has few columns. Q4_K does it, too, less often; Q6_K and Q4_0, which have signed or single
# scales, do not.
#
# Seen: libgguf 0.2.2, which is ggml's quantisers; 400 blocks of normal weights, 8 of 256 columns
# with importance 1, all others 0. Relative square error of the columns that count:
#   Q2_K median 0.072, worst 1.153
#   Q4_K median 0.0025, worst 0.157
#   Q6_K median 0.0000, worst 0.001
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

worst = {}
for name, number in {"Q2_K": 10, "Q4_K": 12, "Q6_K": 14}.items():
    errors = []
    for seed in range(400):
        random = np.random.default_rng(seed)
        x = random.standard_normal((1, 256)).astype(np.float32)
        importance = np.zeros(256, np.float32)
        importance[random.integers(0, 256, 8)] = 1
        blocks = libgguf.quantize_rows_raw(number, x, 1, 256, importance)
        blocks = np.frombuffer(blocks, np.uint8)
        y = np.frombuffer(libgguf.dequantize_rows_raw(number, blocks, 1, 256), np.float32)
        counts = importance > 0
        errors.append(((y - x[0])[counts] ** 2).sum() / (x[0][counts] ** 2).sum())
    worst[name] = max(errors)
    print(f"{name} median {np.median(errors):.4f}, worst {worst[name]:.3f}")
sys.exit(not (worst["Q2_K"] > 1 and worst["Q4_K"] > 0.1 and worst["Q6_K"] < 0.01))
PY
"$work/venv/bin/python" "$work/show.py" || { echo "not as it was" >&2; exit 1; }
echo "still so"
