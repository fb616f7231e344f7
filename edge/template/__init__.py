"""Chat templates: Jinja from strangers, run inside bounds of time, memory and reach.

jinja2's immutable sandbox keeps a template away from Python's internals. It does not stop endless
loops and huge values. So a Budget bounds every step and every value:

    budget.py       the budget, and the size of a value
    text.py         the allowed methods of text, each with a check of the size of its result
    filters.py      the allowed filters, likewise
    environment.py  Program: the parsed template is rewritten so that every loop, literal, slice
                    and `~` passes through the budget; operators and calls are intercepted
    template.py     ChatTemplate: messages to a prompt

Each imports from those above it.
A value that would be too big is refused before it is made. The size of a value counts everything
inside it as often as it appears, so an operation that walks a value (str, ==, hash) is bounded too.
"""
