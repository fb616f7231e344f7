"""Write the cffi module (out-of-line, ABI mode) of native/edge.h.

python native/generate_cffi.py native/edge.h edge/_cffi.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from cffi import FFI


def main(header: str, output: str) -> None:
    """Read the C declarations of `header` as they stand and write the module `output`."""
    ffi = FFI()
    ffi.set_source("edge._cffi", None)
    ffi.cdef(Path(header).read_text(encoding="utf-8"))
    ffi.emit_python_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
