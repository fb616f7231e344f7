"""Execution providers, and sessions on them.

    partition.py   the nodes of a graph that a provider runs
    providers.py   the table of providers
    context.py     checks of compiled graphs
    saturation.py  integer products that overflow on this CPU
    sessions.py    opens a graph in a session
    compiled.py    compiled graphs that are kept on the disk

Each file imports only from the files above it.
"""
