"""What the kernels cost on ARM, counted: none becomes dearer unseen."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.board
def test_instructions_do_not_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per token of a small layer in the wheel's library, against tests/bench/instructions.json."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "bench"))
    import instructions

    counts = instructions.count_small()
    risen = instructions.rises({case: instructions.per_token(c) for case, c in counts.items()})
    why = "--functions says where; if it must be: python tests/bench/instructions.py --update"
    assert not risen, "\n".join([*risen, why])
