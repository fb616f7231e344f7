"""Folders of graphs, checked while they are read.

    protobuf.py  the wire
    proto.py     a model's graph
    folder.py    a folder: ours, and those of others

Each imports from those above it.
"""
