"""The weights of a model, packed for the kernels.

    packed.py        the file of packed weights
    weights.py       weights in memory: packed there, or mapped from a packed file
    joined.py        the weights of a model and of its adapters
    packed_cache.py  packed files in the cache folder
    model_file.py    an open model file: a GGUF or a packed file
    fingerprint.py   bytes that identify a model

Each imports from those above it.
"""
