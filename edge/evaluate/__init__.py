"""What the files of a model are worth: size, quality and speed of each, beside one another.

    table.py    the figures of each file, measured against one base
    picture.py  the figures as a picture: size against divergence

Each imports only from those above it.
"""Files of one model compared: what each costs and gives on this device.

    advise.py  which of them to take, before any is loaded

Each file imports only from the files above it.
"""
