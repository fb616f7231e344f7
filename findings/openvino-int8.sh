#!/bin/sh
# What OpenVINO (onnxruntime-openvino 1.24.1, CPU device) computes depends on whether the CPU has VNNI:
#   - MatMulNBits with blocks of 32 multiplies its inputs as int8 where there is VNNI, and as floats
#     where there is none: the older CPU is exact to 1e-5, the newer one is off by 1e-2 of the spread;
#   - with blocks of 16 it multiplies floats on both;
#   - a static QDQ product of uint8 and int8 overflows without VNNI: off by half of the spread, where
#     the same weights behind DynamicQuantizeLinear, or with uint16 activations, are right.
# ONEDNN_MAX_CPU_ISA=AVX2 is the CPU without VNNI here. The first needs a CPU with VNNI; on one without
# both columns are those of AVX2, and the script says so. Exits with 1 when this has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --only-binary=:all: onnxruntime-openvino==1.24.1 onnx==1.23.2 numpy
cat >"$folder/show.py" <<'PYTHON'
import json
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

K, N, M = 1024, 96, 7
RNG = np.random.default_rng(0)
X = RNG.standard_normal((M, K)).astype(np.float32)


def off(nodes, tensors, wanted):
    """The largest error, in the spread of what is right."""
    tensors = [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", [M, K]), ("y", [M, N]))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    config = {"device_type": "CPU", "load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=[("OpenVINOExecutionProvider", config)]
    )
    return float(np.abs(session.run(None, {"x": X})[0] - wanted).max() / wanted.std())


def blocks(block):
    codes = RNG.integers(0, 16, (N, K), dtype=np.uint8)
    scales = RNG.uniform(0.5, 1.5, (N, K // block)).astype(np.float32) / 8
    weights = (codes - 8.0) * np.repeat(scales, block, 1)
    pairs = codes.reshape(N, K // block, block // 2, 2)
    form = {"K": K, "N": N, "bits": 4, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **form)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8)
    return off([node], {"b": packed, "s": scales}, X @ weights.T)


def int8(kind):
    w = RNG.integers(-127, 128, (K, N)).astype(np.int8)
    tensors = {"w": w, "ws": np.full(N, 1 / 127, np.float32), "wz": np.zeros(N, np.int8)}
    wanted = X.astype(float) @ (w / 127)
    if kind == "dynamic":
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["s", "ws"], ["both"]),
            helper.make_node("Mul", ["f", "both"], ["y"]),
        ]
        return off(nodes, tensors, wanted)
    levels = np.iinfo(kind).max
    step = np.float32((X.max() - X.min()) / levels)
    tensors |= {"s": step, "z": kind(round(-X.min() / step))}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    return off(nodes, tensors, wanted)


json.dump(
    {
        "version": ort.__version__,
        "MatMulNBits, blocks of 32": blocks(32),
        "MatMulNBits, blocks of 16": blocks(16),
        "QDQ, uint8 x int8": int8(np.uint8),
        "QDQ, uint16 x int8": int8(np.uint16),
        "DynamicQuantizeLinear, uint8 x int8": int8("dynamic"),
    },
    sys.stdout,
)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" >"$folder/here.json"
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/show.py" >"$folder/avx2.json"
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import sys

here, avx2 = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("here", "avx2"))
print(f"onnxruntime-openvino {here.pop('version')}; largest error, of the spread")
print(f"{'':38}{'this CPU':>12}{'AVX2':>12}")
for name in here:
    print(f"{name:38}{here[name]:12.6f}{avx2[name]:12.6f}")
flags = " ".join(line for line in open("/proc/cpuinfo") if line.startswith("flags"))
vnni = "avx512_vnni" in flags or "avx_vnni" in flags
print(f"this CPU has {'' if vnni else 'no '}VNNI")
blocks, static = "MatMulNBits, blocks of 32", "QDQ, uint8 x int8"
as_seen = avx2[blocks] < 1e-4 and avx2[static] > 0.2 and avx2["MatMulNBits, blocks of 16"] < 1e-4
if vnni:
    as_seen = as_seen and here[blocks] > 3e-3 and here[static] < 0.1
    as_seen = as_seen and here["MatMulNBits, blocks of 16"] < 1e-4
print("as described" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
