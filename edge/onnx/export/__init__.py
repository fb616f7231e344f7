"""Writing a model as ONNX files.

    writer.py     writes a graph and its file of weights
    blocks.py     weights as integers in blocks
    linear.py     matrix products with weights in blocks
    lowering.py   ops as ONNX nodes: the part that both dialects share
    cpu.py        the dialect for CPUs
    step.py       one step of the dialect for NPUs
    htp.py        matrix products for Hexagon: float16, int8
    calibrate.py  ranges of activations for int8
    config.py     the other files of a folder: tokenizer, settings
    npu.py        the dialect for NPUs
    ahead.py      compiling ahead of time
    export.py     exports a model to a folder

Each file imports only from the files above it.
"""
