"""From a graph to ONNX files.

    writer.py     nodes and one data file
    blocks.py     weights as integers in blocks
    linear.py     matrix products
    lowering.py   what both dialects share
    cpu.py        the dialect of the CPU
    step.py       one step of the dialect of NPUs
    htp.py        its integers, for Hexagon
    calibrate.py  their ranges
    config.py     the files beside the graphs
    npu.py        the dialect of NPUs
    ahead.py      compiled before the device sees it
    export.py     a model to a folder

Each imports from those above it.
"""
