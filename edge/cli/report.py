"""`--report`: what was planned of memory and speed, what it was, and on which cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge import memory

if TYPE_CHECKING:
    from edge.backend import Backend
    from edge.engine import Engine
    from edge.results import Usage


def lines(engine: Backend, usage: Usage) -> list[str]:
    """The table of memory, part by part, speed and threads; after an answer."""
    from edge.engine import Engine

    if not isinstance(engine, Engine):
        return []
    threads = engine.cores.lines(engine.refused)
    return [*memory_lines(engine), speed_line(engine, usage), *threads]


def memory_lines(engine: Engine) -> list[str]:
    """Planned and real, part by part; "?" where the system does not tell what is real."""
    ledger, found, peak = engine.ledger, engine.resident(), memory.peak()
    rows: list[tuple[str, int, int | None]] = [
        (name, ledger.parts[name], found[name]) for name in found
    ]
    known = [real for real in found.values() if real is not None]
    rest = peak - sum(known) if peak is not None and len(known) == len(found) else None
    rows.append(("everything else", ledger.needed - sum(row[1] for row in rows), rest))
    rows.append(("peak", ledger.needed, peak))
    lines = [f"{'memory':<16}{'planned':>12}{'real':>12}"]
    for name, planned, real in rows:
        shown = "?" if real is None else memory.show(real)
        lines.append(f"{name:<16}{memory.show(planned):>12}{shown:>12}")
    if ledger.budget is not None:
        kind = "stated" if ledger.is_stated else "what was available"
        lines[-1] += f", budget {memory.show(ledger.budget)} ({kind})"
    return lines


def speed_line(engine: Engine, usage: Usage) -> str:
    """Predicted and real tokens per second of the answer, where there is a prediction."""
    from edge.bench import predict

    speed = usage.decode_tokens_per_second
    if not speed:
        return "speed: nothing was decoded that could be measured"
    measured = predict.Measured.load(engine.threads)
    if measured is None:
        return (
            f"speed: {speed:.1f} tokens/s, nothing predicted: `edge-run plan` measures this machine"
        )
    depth = usage.prompt_tokens + usage.completion_tokens // 2
    predicted = predict.tokens_per_second(predict.demand_of(engine), depth, measured)
    off = 100 * (predicted / speed - 1)
    how = f"{abs(off):.0f} % too {'high' if off > 0 else 'low'}"
    return f"speed: predicted {predicted:.1f} tokens/s, was {speed:.1f}: {how}"
