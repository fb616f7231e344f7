"""Run as a script by test_kill: a model at work that may be killed at any moment.

A model cannot be used across a fork, but Python can: this process imports everything, and each
line `file every n_tokens` on standard input makes a child that loads the model, goes on with the
session in the file up to so many tokens, and says how many there are after each. Printed are the
child's process id, those numbers, and an empty line when it is gone.
"""

from __future__ import annotations

import os
import sys

from sessions import PROMPT, options

import edge
import edge.engine.engine
import edge.session.restore
import edge.tokenizer.backend


def work(model_file: str, file: str, every: int, n_tokens: int) -> None:
    """Begin, or go on."""
    with edge.load(model_file, threads=1, context=2048) as model:
        if os.path.exists(file):
            session = edge.resume(file, model, autosave=every)
            assert isinstance(session, edge.Session)
        else:
            session = model.session(**options(model))
            session.autosave(file, every)
        prompt = "" if session.tokens else PROMPT
        for piece in session.stream(prompt, max_tokens=n_tokens):
            if piece.token is not None:
                n = len(session.tokens)
                say(n)
                if n % 50 == 0:
                    session.save(file)  # written anew: a kill may come here too
                if n >= n_tokens:
                    break


def say(value: object) -> None:
    """Unbuffered: what was said was said before the kill."""
    os.write(1, f"{value}\n".encode())


def main() -> None:
    """Children one after another."""
    for line in sys.stdin:
        file, every, n_tokens = line.split()
        child = os.fork()
        if child == 0:
            say(os.getpid())
            try:
                work(sys.argv[1], file, int(every), int(n_tokens))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        say("")


if __name__ == "__main__":
    main()
