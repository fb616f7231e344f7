"""The native engine: a graph planned, packed and run.

    ops.py       the native ops, and their buffers
    plan.py      the graph as native ops
    chain.py     matmuls of one type, timed
    ledger.py    the memory that a model takes
    predict.py   how fast a model will be
    describe.py  a file described: its graph, plan and ledger
    engine.py    the loaded model, and the one call that runs tokens
    states.py    what a run has in its buffers before an op
    parts.py     a model that runs part by part, with one part in memory

Each imports from those above it.
"""
