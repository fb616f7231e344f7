#!/bin/sh
# onnxruntime 1.32.0 cannot load a valid graph with `session.x64quantprecision` = 1, the documented
# cure for products of uint8 and int8 that overflow on x86 CPUs without VNNI, when two products share
# a weight or a zero point: "Attempt to replace the existing tensor". It loads with 1.24.4 and before,
# and fails with 1.25.1, 1.27.0 and 1.32.0. And:
#   - the header says that the setting is only effective on CPUs without VNNI; it rewrites the graph,
#     and fails, on those with VNNI too;
#   - products in the branches of an If stay as they are, and overflow on CPUs without VNNI.
# Shown on any x86-64 CPU, but for the last: only one with AVX2 and without VNNI overflows
# (EMULATOR="qemu-x86_64 -cpu Haswell" is such a one).
# Exits with 1 when this has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --only-binary=:all: onnxruntime==1.32.0 onnx==1.23.2 numpy
cat >"$folder/show.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, checker, helper, numpy_helper

K = 64
RNG = np.random.default_rng(0)
W = [RNG.integers(-127, 128, (K, K)).astype(np.int8) for _ in range(2)]
X = RNG.standard_normal((1, K)).astype(np.float32)


def product(x, w, z, y):
    return [
        helper.make_node("DynamicQuantizeLinear", [x], [f"{y}q", f"{y}s", f"{y}z"]),
        helper.make_node("MatMulInteger", [f"{y}q", w, f"{y}z", z], [f"{y}i"]),
        helper.make_node("Cast", [f"{y}i"], [f"{y}f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{y}f", f"{y}s"], [y]),
    ]


def value(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, K])


def model(nodes, tensors, *more):
    tensors = [numpy_helper.from_array(t, name) for name, t in tensors.items()]
    graph = helper.make_graph(nodes, "g", [value("x"), *more], [value("y")], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(made)
    return made.SerializeToString()


def run(content, exact):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", exact)
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as e:
        return str(e)
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {"x": X, **({"yes": np.array(True)} if "yes" in names else {})})[0]


zero = np.zeros((), np.int8)
own = model(
    [*product("x", "w0", "z0", "m"), *product("m", "w1", "z1", "y")],
    {"w0": W[0], "w1": W[1], "z0": zero, "z1": zero},
)
shared_zero = model(
    [*product("x", "w0", "z", "m"), *product("m", "w1", "z", "y")],
    {"w0": W[0], "w1": W[1], "z": zero},
)
shared_weight = model(
    [*product("x", "w", "z0", "m"), *product("m", "w", "z1", "y")],
    {"w": W[0], "z0": zero, "z1": zero},
)
branches = {
    f"{name}_branch": helper.make_graph(product("x", "w", "z", f"{name}y"), name, [], [value(f"{name}y")])
    for name in ("then", "else")
}
inside = model(
    [helper.make_node("If", ["yes"], ["y"], **branches)],
    {"w": W[0], "z": zero},
    helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
)

print(f"onnxruntime {ort.__version__}")
failures, overflow = [], {}
for name, content in (
    ("own", own), ("shared zero point", shared_zero), ("shared weight", shared_weight)
):
    for exact in "01":
        found = run(content, exact)
        text = found if isinstance(found, str) else f"runs, y[0] = {found[0, 0]:.1f}"
        print(f"{name}, x64quantprecision {exact}: {text}")
        failures.append(isinstance(found, str) and "replace the existing tensor" in found)
exact_y = X.astype(float) @ W[0]
for exact in "01":
    overflow[exact] = float(np.abs(run(inside, exact) - exact_y).max() / exact_y.std())
    print(f"inside an If, x64quantprecision {exact}: off by {overflow[exact]:.3f} of the spread")
flags = " ".join(line for line in open("/proc/cpuinfo") if line.startswith("flags"))
vnni = "avx512_vnni" in flags or "avx_vnni" in flags
print(f"this machine has {'' if vnni else 'no '}VNNI (an emulated CPU may not)")
as_seen = failures == [False, False, False, True, False, True] and overflow["0"] == overflow["1"]
print("as described" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
${EMULATOR:-} "$folder/venv/bin/python" "$folder/show.py"
