"""Make data/imatrix/*.gguf: what llama.cpp's llama-imatrix measures on tiny random models.

python tests/make_imatrix.py PATH/TO/llama-imatrix
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tiny import write_tiny

DATA = Path(__file__).parent / "data"
TEXT, CONTEXT, CHUNKS = DATA / "english.txt", 64, 8
#: Architecture -> the reference of a tiny model of it, in F32.
REFERENCES = {arch: DATA / "imatrix" / f"{arch}.gguf" for arch in ("llama", "qwen3moe")}


def main(program: str) -> None:
    """Run llama-imatrix on each model."""
    window = ["-c", f"{CONTEXT}", "-b", f"{CONTEXT}", "-ub", f"{CONTEXT}"]
    with tempfile.TemporaryDirectory() as folder:
        for arch, reference in REFERENCES.items():
            model = write_tiny(Path(folder) / "model.gguf", arch, type="F32")
            reference.parent.mkdir(exist_ok=True)
            files = ["-m", model, "-f", TEXT.name, "-o", reference]
            how = ["--chunks", f"{CHUNKS}", "--process-output", "--no-ppl", "-t", "1"]
            subprocess.run([program, *files, *window, *how], check=True, cwd=DATA)


if __name__ == "__main__":
    main(sys.argv[1])
