"""The waist: an architecture as a flat list of ops.

    ops.py    the ops, and what they are made of
    graph.py  a graph of them, checked while it is built

Each imports from those above it.
"""
