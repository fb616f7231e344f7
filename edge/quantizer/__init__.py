"""Models in fewer bits.

    encode.py  rows of weights as blocks of a type, and back

Each imports from those above it.
"""The quantiser: GGUF files of smaller types, made from larger ones.

Its files, from the bottom up; each knows only those above it:

    imatrix.py      importance matrices: how strongly each input column is used; read, written
    activations.py  what matrices read, while the model runs a text
    mixing.py       what attention makes of the inputs of its values
    squares.py      importance matrices measured
    moments.py      second moments of what matrices read
"""
