"""Sessions and chats: what a model and an engine are used through.

    results.py     what calls return
    sampler.py     from logits to a token
    recommended.py what a model's files recommend of sampling
    request.py     the options of a call
    stops.py       where an answer ends
    overlap.py     the same text in other tokens
    transcript.py  the tokens, and the cache of their keys and values
    contents.py    what a session's file holds
    file.py        the file: a log of records
    journal.py     a session that writes itself down
    stream.py      an answer under way
    generate.py    from a prompt to pieces: the one loop
    session.py     tokens that the model continues
    chat.py        messages, and a session
    restore.py     from a file back to a session or a chat

Each imports from those above it.
"""
