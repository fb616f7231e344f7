"""Folders of graphs, run.

    kv.py       keys and values in the host's arrays
    runners.py  a step, by the kind of graph
    budget.py   what it takes of the memory
    engine.py   the model loaded
    plan.py     what it would take, before it is loaded

Each imports from those above it.
"""
