"""Keys and values: the cache of a session, in pages that sessions share.

    shape.py       what a page holds
    page_store.py  pages of computed prompts in a folder
    pool.py        the pages of a model, and the tree of what is in them
    cache.py       the table of one session

Each imports from those above it.
"""
