"""The engine that runs a folder of graphs.

    kv.py       keys and values in arrays of the host
    runners.py  one run of a graph, for each kind of graph
    budget.py   the memory that a model needs
    engine.py   a loaded model
    plan.py     the facts of `edge-run plan`

Each file imports only from the files above it.
"""
