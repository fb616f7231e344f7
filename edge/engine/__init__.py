"""The native engine: a graph planned, packed and run.

    plan.py      the graph as native ops and buffers
    ledger.py    what it takes of the memory
    predict.py   how fast it will be
    engine.py    the model loaded, and the one call that runs tokens

Each imports from those above it.
"""
