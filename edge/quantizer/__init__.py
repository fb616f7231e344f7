"""Models in fewer bits.

    encode.py  rows of weights as blocks of a type, and back

Each imports from those above it.
"""
