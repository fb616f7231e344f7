"""Keys and values: the cache of a session, in pages that sessions share.

shape.py       what a page holds
page_store.py  pages of computed prompts in a folder
pool.py        the pages of a model, and the tree of what is in them
cache.py       the table of one session
"""

from __future__ import annotations

from edge.kv.cache import KVCache
from edge.kv.pool import PagePool
from edge.kv.shape import PAGE, KVShape, WhenFull, kv_types, too_many

__all__ = ["PAGE", "KVCache", "KVShape", "PagePool", "WhenFull", "kv_types", "too_many"]
