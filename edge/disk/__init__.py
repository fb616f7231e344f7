"""What edge keeps on the disk.

    own.py     files and folders that nobody else can have written
    atomic.py  files that are whole or not there
    room.py    the folders of the cache, and how much they may hold
    pull.py    the default model

Each imports from those above it.
"""
