"""onnxruntime on an x86 CPU without VNNI, where it adds products of 8 bits in 16."""

from __future__ import annotations

import platform
import sys

import pytest
from machines import CPU, ROOT, emulate, output_of

ZEN3 = CPU("x86_64", "EPYC-Milan", ("avx2",))
FILES = [ROOT / "tests" / name for name in ("test_onnx_saturation.py", "test_onnx_npu.py")]
CHOSEN = "saturation or (blocks_stand and phi3 and (Q4_0 or Q8_0))"


@pytest.mark.board
@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs this machine's own Python")
def test_onnx_without_vnni() -> None:
    probe = "from edge.onnx.providers.saturation import saturates; print(saturates())"
    run = emulate(ZEN3, sys.executable, "-c", probe, env={"PYTHONPATH": str(ROOT)})
    assert output_of(run).strip() == "True"  # or the emulated CPU is not what it should be
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml")
    tests = emulate(ZEN3, sys.executable, "-m", "pytest", *options, "-k", CHOSEN, *FILES)
    assert "8 passed" in output_of(tests)
