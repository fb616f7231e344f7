"""Files that edge keeps on the disk.

    own.py       files and folders that no other user can have written
    atomic.py    files that are either complete or absent
    room.py      the folders of the cache, and how much they may hold
    download.py  files from servers
    index.py     wheels in the package index
    pull.py      the default model

Each imports from those above it.
"""
