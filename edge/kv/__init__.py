"""Keys and values: the cache of a session, in pages that sessions share.

    shape.py        which layers share pages, and what a page holds
    page_store.py   pages of computed prompts in a folder
    page_memory.py  memory in pages of one size
    pool.py         the pages of a model, found by what is in them
    table.py        the pages of one layer group that a session has
    cache.py        the tables of one session, and its tokens

Each imports from those above it.
"""
