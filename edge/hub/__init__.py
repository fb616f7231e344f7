"""Models to get: where they are, which one fits, and what of them lies on this machine.

    names.py   short names of models, and where each is
    wanted.py  what a user may write for MODEL
    offers.py  files of GGUF, grouped into models; and the one that was asked for
    stored.py  what lies on this machine, of edge and of others
    remote.py  what a server has: its files, their headers
    fitting.py the one of several models that fits the memory
    named.py   a MODEL that is no file: found here, or fetched
    find.py    any MODEL: its path
    at_hand.py the files among which a user chooses
    remove.py  models of edge, removed

Each imports from those above it.
"""
