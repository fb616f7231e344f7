"""Models in fewer bits.

    encode.py  rows of weights as blocks of a type, and back

Each imports from those above it.
"""The quantiser: GGUF files of smaller types, made from larger ones.

Its files, from the bottom up; each knows only those above it:

    imatrix.py      how strongly each input column of a matrix is used: measured, read, written
"""
