"""Ctrl-C at a chosen step of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any


def interrupted(call: Callable[[], object], at: int, modules: list[ModuleType]) -> bool:
    """Call, and raise KeyboardInterrupt before the at-th bytecode of these modules that is run.
    False: the call has come to its end before.
    """
    files, count, old = {module.__file__ for module in modules}, 0, sys.gettrace()

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "opcode":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return step

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "abandon":
            return None  # in a finalizer nobody hears of it
        frame.f_trace = step  # in this order: Python 3.13 looks for it when the next is set
        frame.f_trace_opcodes = True
        return step

    sys._getframe().f_trace_opcodes = True  # Python 3.12 looks whether any frame has it
    sys.settrace(enter)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(old)
    return False
