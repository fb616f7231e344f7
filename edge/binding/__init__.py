"""The native library, found and loaded; and ctypes in the place of cffi where that is missing.

    ctypes_ffi.py  what edge uses of cffi, by ctypes
    library.py     finds the library, and the binding to call it by

Each imports from those above it. A program can say what a bus error does before the library is
loaded, so that importing this loads nothing; importing `edge.native` does.
"""
