"""The native engine: a graph planned, packed and run.

    plan.py      the graph as native ops and buffers
    ledger.py    what it takes of the memory
    predict.py   how fast it will be
    describe.py  a file described: its graph, plan and ledger
    engine.py    the model loaded, and the one call that runs tokens

Each imports from those above it.
"""
