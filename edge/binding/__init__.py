"""Finds and loads the native library, with cffi, or with ctypes where cffi is missing.

    ctypes_ffi.py  the part of cffi that edge uses, over ctypes
    library.py     finds the library, and the binding that calls it

Each imports from those above it. Importing this package loads nothing, so a program can set
`library.on_bus_error` first; importing `edge.native` loads the library.
"""
