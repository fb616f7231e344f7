"""The quantiser: GGUF files of fewer bits, made from others.

    encode.py       rows of floats to the blocks of a type, and back
    imatrix.py      importance matrices: how strongly each input column is used; read, written
    types.py        which type a tensor may have
    standard.py     llama.cpp's mixes of types
    recipe.py       which type each tensor gets: one type, a mix, or the rules of a file
    source.py       the weights of a file as floats, slice by slice
    writer.py       a GGUF file written tensor by tensor, in any order, which a cut run continues
    runnable.py     the model that runs texts: one in floats as a copy in Q8_0
    activations.py  what matrices read, while the model runs a text
    mixing.py       what attention makes of the inputs of its values
    squares.py      importance matrices measured
    moments.py      second moments of what matrices read
    calibration.py  the texts that a model runs while it is quantised
    feedback.py     rounding with error feedback
    kept.py         measurements that are kept
    allocate.py     types under a size, by the damage that each does
    sensitivity.py  what rounding one matrix does to the model's output
    damage.py       the damage that each type would do to each matrix
    target.py       what a file may take
    sized.py        the types of a model under a size
    job.py          quantize: reads, encodes and writes, slice by slice

The folder `recipes` has the recipes that ship. Each file imports only from those above it.
"""
