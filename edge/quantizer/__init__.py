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
"""The quantiser: smaller files of a model.

    encode.py       rows of weights as blocks of a type, and back
    imatrix.py      importance matrices: how strongly each input column is used; read, written
    activations.py  what matrices read, while the model runs a text
    mixing.py       what attention makes of the inputs of its values
    squares.py      importance matrices measured
    moments.py      second moments of what matrices read
    feedback.py     rounding with error feedback
    types.py        which type a tensor may have
    standard.py     llama.cpp's mixes of types
    recipe.py       which type each tensor gets: one type, a mix, or the rules of a file
    source.py       the weights of a file as floats, slice by slice
    writer.py       a GGUF file written tensor by tensor, in any order, which a cut run continues
    job.py          quantize: reads, rounds and writes

The folder `recipes` has the recipes that ship.
"""
