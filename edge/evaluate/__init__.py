"""What the files of a model are worth on this device: size, quality and speed, beside one another.

    table.py    the figures of each file, measured against one base
    picture.py  the figures as a picture: size against divergence
    advise.py   which of them to take, before any is loaded

Each file imports only from those above it.
"""
