"""`--report`: planned and real memory and speed, and the cores that ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.device import memory
from edge.sizes import show

if TYPE_CHECKING:
    from edge.backend import Backend, MemoryPlan
    from edge.engine.engine import Engine
    from edge.onnx.run.engine import OnnxEngine
    from edge.session.results import Usage


def lines(engine: Backend, usage: Usage) -> list[str]:
    """The memory part by part, the speed and the threads of an answer."""
    from edge.engine.engine import Engine
    from edge.onnx.run.engine import OnnxEngine

    if isinstance(engine, OnnxEngine):
        return _onnx_memory_lines(engine)
    assert isinstance(engine, Engine)
    threads = engine.cores.lines(engine.refused)
    return [*memory_lines(engine), speed_line(engine, usage), *threads]


def explain_lines(engine: Backend) -> list[str]:
    """Which provider runs the model, and how much of it."""
    from edge.onnx.run.engine import OnnxEngine

    if isinstance(engine, OnnxEngine):
        return engine.explain()
    return [f"runs on the CPU, all of it: kernels {engine.isa}"]


def _onnx_memory_lines(engine: OnnxEngine) -> list[str]:
    """The plan part by part, and the real peak: onnxruntime reports no parts."""
    plan, peak = engine.ledger, memory.peak()
    lines = [f"{'memory':<16}{'planned':>12}{'real':>12}"]
    lines += [f"{name:<16}{show(size):>12}" for name, size in plan.parts.items()]
    real = "?" if peak is None else show(peak)
    lines.append(f"{'peak':<16}{show(plan.needed):>12}{real:>12}")
    lines[-1] += _of_budget(plan)
    return lines


def memory_lines(engine: Engine) -> list[str]:
    """Planned and real memory, part by part; "?" where the system does not report the latter."""
    ledger, resident, peak = engine.ledger, engine.resident(), memory.peak()
    rows: list[tuple[str, int, int | None]] = [
        (name, ledger.parts[name], resident[name]) for name in resident
    ]
    known = [real for real in resident.values() if real is not None]
    rest = peak - sum(known) if peak is not None and len(known) == len(resident) else None
    rows.append(("everything else", ledger.needed - sum(row[1] for row in rows), rest))
    rows.append(("peak", ledger.needed, peak))
    lines = [f"{'memory':<16}{'planned':>12}{'real':>12}"]
    for name, planned, real in rows:
        shown = "?" if real is None else show(real)
        lines.append(f"{name:<16}{show(planned):>12}{shown:>12}")
    lines[-1] += _of_budget(ledger)
    return lines


def _of_budget(plan: MemoryPlan) -> str:
    if plan.budget is None:
        return ""
    kind = "stated" if plan.is_stated else "what was available"
    return f", budget {show(plan.budget)} ({kind})"


def speed_line(engine: Engine, usage: Usage) -> str:
    """Predicted and real tokens per second of an answer, or why there is no prediction."""
    from edge.engine import predict

    speed = usage.decode_tokens_per_second
    if not speed:
        return "speed: nothing was decoded that could be measured"
    measured, demand = predict.Bandwidth.load(engine.threads), predict.demand_of(engine)
    if measured is None or not measured.covers(demand):
        return (
            f"speed: {speed:.1f} tokens/s, nothing predicted: `edge-run plan` measures this machine"
        )
    depth = usage.prompt_tokens + usage.completion_tokens // 2
    predicted = predict.tokens_per_second(demand, depth, measured)
    off = 100 * (predicted / speed - 1)
    error = f"{abs(off):.0f} % too {'high' if off > 0 else 'low'}"
    return f"speed: predicted {predicted:.1f} tokens/s, was {speed:.1f}: {error}"
