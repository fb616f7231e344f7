"""Keys and values: the cache of a session, in pages that sessions share.

    shape.py        which layers share pages, and what a page holds
    page_store.py   pages of computed prompts, in a folder
    page_memory.py  memory in pages of one size
    pool.py         the pages of a model, found by their content
    table.py        the pages of one layer group in one session
    cache.py        the tokens of one session, and its tables

Each imports from those above it.
"""
