"""What comes from strangers: files that are checked while they are read.

    tensor_types.py  the types of tensors that GGUF knows, and the bytes of each
    gguf_reader.py   bounds and bytes: nothing is taken on trust
    gguf.py          GGUF: a header of metadata and tensors, the data mapped
    json_file.py     JSON, as folders of models hold it
    text_file.py     text to be read by a model, no more of it than has room

gguf.py imports from those above it; the others stand alone.
"""
