"""Files from strangers, which are checked while they are read.

    tensor_types.py  the tensor types of GGUF, and the bytes of each
    file_types.py    the types of whole files, as GGUF numbers them
    gguf_reader.py   reads the bytes of a GGUF file, each step checked
    gguf.py          a GGUF file: the header with metadata and tensors, the data mapped
    gguf_writer.py   the bytes of a header to write
    json_file.py     the JSON files of a model's folder
    text_file.py     text for a model, of which only as much is read as is wanted

gguf.py and gguf_writer.py import from those above them; the others stand alone.
"""
