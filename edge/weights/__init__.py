"""The weights of a model, packed for the kernels.

    packed.py        the file of packed weights
    weights.py       weights in memory: packed there, or mapped from a packed file
    packed_cache.py  packed files in the cache folder
    model_file.py    a model file of either kind, opened
    fingerprint.py   what tells one model from another

Each imports from those above it.
"""
