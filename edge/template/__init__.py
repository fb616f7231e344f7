"""Chat templates: Jinja from strangers, run inside bounds of time, memory and reach.

jinja2's immutable sandbox keeps a template away from Python's insides. What it does not stop
are loops without end and values without measure. Here nothing is made without a Budget:

    budget.py       the budget, and what a value weighs
    text.py         the methods of text there are, each with a check of what it would make
    filters.py      the filters there are, likewise
    environment.py  Program: the parsed template is rewritten so that every loop, literal, slice
                    and `~` passes through the budget; operators and calls are intercepted
    template.py     ChatTemplate: messages to a prompt

Each imports from those above it.
What would be too big is refused before it is made. The weight of a value counts everything
inside it as often as it appears, so whatever walks a value (str, ==, hash) is bounded too.
"""
