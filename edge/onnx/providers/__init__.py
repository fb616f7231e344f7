"""Execution providers, and the sessions that they open.

    partition.py   what runs where
    providers.py   those there are
    context.py     compiled graphs, described
    saturation.py  integer products that this CPU cuts off
    sessions.py    a graph opened
    compiled.py    compiled graphs in the cache folder

Each imports from those above it.
"""
