"""Reading folders of graphs, with checks.

    protobuf.py  the wire format
    proto.py     the graph of an .onnx file
    folder.py    a folder: an export of edge, optimum or onnxruntime-genai

Each file imports only from the files above it.
"""
