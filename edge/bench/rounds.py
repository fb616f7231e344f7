"""Rounds of measurements: edge alone in this process, or edge and peers, a fresh process each.

Speeds drift on most machines, memory bandwidth most of all. So the compared things take turns: the
cases of a round, the runtimes of a round (each round begins with another one), and between them
the roofs of the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import edge
from edge.bench.ours import Ours, Work, work
from edge.bench.runner import PEERS, Case, seconds, speed, warm_up
from edge.device import cores
from edge.device.machine import Machine, Roofs
from edge.engine.engine import DescribedFile, Engine
from edge.errors import EdgeError, InputError, UnsupportedError
from edge.loading import KV_TYPES, NativeOptions
from edge.onnx import is_onnx

__all__ = ["Measurement", "Outcome", "Peer", "Settings", "measure", "measure_files"]

#: With peers, a round measures a case until it took ENOUGH seconds, at most MOST times.
ENOUGH, MOST = 1.0, 3
_RUNNER = Path(__file__).with_name("runner.py")

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)."""


@dataclass(frozen=True)
class Peer:
    """A runtime to compare with edge.

    name: one of `runner.PEERS`. python: an interpreter that can import it. model: the file that it
    runs, None: the same as edge.
    """

    name: str
    python: str = sys.executable
    model: str | None = None


@dataclass(frozen=True)
class Settings:
    """What to measure.

    threads: None: the engine's own choice. rounds: after a warm-up. kv: the type of keys and
    values, here and in peers, one of `edge.loading.KV_TYPES`. options: more arguments of
    `edge.load`, plain values.
    """

    cases: tuple[Case, ...]
    threads: tuple[int | None, ...] = (None,)
    rounds: int = 5
    peers: tuple[Peer, ...] = ()
    kv: str = "f16"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """The tokens that the largest case needs."""
        return max(case.depth + case.tokens for case in self.cases)

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `edge.load` other than context and threads."""
        return {**self.options, "kv": self.kv}

    def check(self) -> None:
        """Raise InputError for settings that cannot be measured."""
        if not self.cases or not self.threads or self.rounds < 1:
            raise InputError("there is nothing to measure")
        if self.kv not in KV_TYPES:
            raise InputError(f"kv {self.kv!r}: one of {', '.join(KV_TYPES)}")
        for case in self.cases:
            if case.kind not in ("prompt", "decode") or case.tokens < 1 or case.depth < 0:
                raise InputError(f"{case} cannot be measured")
        for peer in self.peers:
            if peer.name not in PEERS:
                raise InputError(f"{peer.name} is no peer: {', '.join(PEERS)}")
            if peer.model is not None and not os.path.isfile(peer.model):
                raise InputError(f"{peer.model}, for {peer.name}, is not a file")


@dataclass(frozen=True)
class Outcome:
    """The result of one runtime in one round.

    speeds: tokens per second by case. error: why there are no speeds.
    """

    build: str = ""
    speeds: tuple[float, ...] = ()
    error: str | None = None


@dataclass
class Measurement:
    """All rounds with one number of threads.

    weight_bytes: in memory. kv: the type of keys and values. work: by case, empty where onnxruntime
    does it. roofs: one for each time that they were measured. rounds: runtime ("edge" or a peer's
    name) -> its outcomes.
    """

    threads: int
    isa: str = ""
    weight_bytes: int = 0
    kv: str = ""
    work: tuple[Work, ...] = ()
    roofs: list[Roofs] = field(default_factory=list)
    rounds: dict[str, list[Outcome]] = field(default_factory=dict)


def measure(path: str, settings: Settings, progress: Progress | None = None) -> list[Measurement]:
    """Measure a model; one entry per number of threads.

    A peer that cannot be measured has outcomes with an error, and the others are still measured.
    Raises what `edge.load` raises, ContextError for a depth that the model does not have,
    InputError.
    """
    settings.check()
    if not is_onnx(path):  # raise errors of the file here, not in another process
        DescribedFile.open(path, NativeOptions(context=settings.context)).close()
    report = progress or (lambda what, done, total: None)
    measure_threads = _with_peers if settings.peers else _alone
    return [measure_threads(path, threads, settings, report) for threads in settings.threads]


def measure_files(
    paths: Sequence[str], settings: Settings, progress: Progress | None = None
) -> list[Measurement]:
    """Measure several models in the same rounds; one entry per path.

    Each round begins with another model. Each model runs in a process of its own, so that one of
    them is in memory at a time. No roofs are measured. settings: without peers, of one number of
    threads. Raises what `measure` raises.
    """
    settings.check()
    results = [Measurement(0) for _ in paths]
    for i in range(settings.rounds):
        for j in range(len(paths)):
            k = (i + j) % len(paths)
            outcome = _ours_once(
                paths[k], settings.threads[0], settings, results[k], has_roofs=False
            )
            results[k].rounds.setdefault("edge", []).append(outcome)
            if progress is not None:
                progress("measuring speed", i * len(paths) + j + 1, settings.rounds * len(paths))
    return results


def _alone(path: str, threads: int | None, settings: Settings, progress: Progress) -> Measurement:
    def loading(done: int, total: int) -> None:
        progress("loading", done, total)

    cases = settings.cases
    total = settings.rounds * (len(cases) + 1)
    with Ours(path, threads, settings.context, loading, **settings.loading) as ours:
        result = _described(ours, cases)
        what = f"measuring, threads {result.threads}"
        with Machine(result.threads) as machine:
            warm_up(ours, cases)
            for i in range(settings.rounds):
                result.roofs.append(machine.measure())
                speeds = []
                for j, case in enumerate(cases):
                    speeds.append(case.tokens / seconds(ours, case))
                    progress(what, i * (len(cases) + 1) + j + 1, total)
                outcome = Outcome(ours.build(), tuple(speeds))
                result.rounds.setdefault("edge", []).append(outcome)
            result.roofs.append(machine.measure())
    return result


def _described(ours: Ours, cases: Sequence[Case]) -> Measurement:
    engine = ours.engine
    if isinstance(engine, Engine):
        works = tuple(work(engine, case) for case in cases)
        return Measurement(engine.threads, engine.isa, engine.packed_bytes, engine.kv.type, works)
    from edge.onnx.run.engine import OnnxEngine

    assert isinstance(engine, OnnxEngine)
    weights = engine.ledger.parts["weights"]
    return Measurement(engine.threads, engine.isa, weights, engine.folder.dtype)


# ---- with peers ------------------------------------------------------------------------------


def _with_peers(
    path: str, threads: int | None, settings: Settings, progress: Progress
) -> Measurement:
    names: list[Peer | None] = [None, *settings.peers]  # None: edge
    total = settings.rounds * len(names)
    result = Measurement(0)
    errors: dict[str, str] = {}  # of peers that failed: they are not run again
    for i in range(settings.rounds):
        for j in range(len(names)):
            peer = names[(i + j) % len(names)]
            if peer is None:
                outcome = _ours_once(path, threads, settings, result)
            elif peer.name in errors:
                outcome = Outcome(error=errors[peer.name])
            else:
                outcome = _peer_once(path, peer, cores.choose(threads).threads, settings)
            name = "edge" if peer is None else peer.name
            if outcome.error is not None:
                errors[name] = outcome.error
            result.rounds.setdefault(name, []).append(outcome)
            progress(f"round {i + 1} of {settings.rounds}, {name}", i * len(names) + j + 1, total)
    return result


def _ours_once(
    path: str,
    threads: int | None,
    settings: Settings,
    result: Measurement,
    *,
    has_roofs: bool = True,
) -> Outcome:
    """Measure edge in a process of its own, and write its facts to `result`. Raises its errors."""
    job: dict[str, Any] = {"model": path, "threads": threads, "context": settings.context}
    job |= {"cases": settings.cases, "enough": ENOUGH, "most": MOST, "options": settings.loading}
    job["has_roofs"] = has_roofs
    root = str(Path(edge.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    answer = _run([sys.executable, "-m", "edge.bench", json.dumps(job)], env)
    if "error" in answer:
        raise EdgeError(answer["error"])
    result.threads, result.isa, result.kv = answer["threads"], answer["isa"], answer["kv"]
    result.weight_bytes = answer["weight_bytes"]
    result.work = tuple(Work(*w) for w in answer["work"])
    result.roofs += [Roofs(*r) for r in answer["roofs"]]
    return Outcome(answer["build"], tuple(answer["speeds"]))


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Measure edge in the process of `python -m edge.bench JOB`; see `runner.main`."""
    try:
        return _run_ours(job)
    except EdgeError as e:
        return {"error": str(e)}


def _run_ours(job: dict[str, Any]) -> dict[str, Any]:
    cases = [Case(*case) for case in job["cases"]]
    with Ours(job["model"], job["threads"], job["context"], **job["options"]) as ours:
        facts = _described(ours, cases)
        with Machine(facts.threads) if job["has_roofs"] else nullcontext() as machine:
            warm_up(ours, cases)
            roofs, speeds = [machine.measure()] if machine else [], []
            for case in cases:
                speeds.append(speed(ours, case, job["enough"], job["most"]))
                roofs += [machine.measure()] if machine else []
        return {
            "build": ours.build(),
            "threads": facts.threads,
            "isa": facts.isa,
            "weight_bytes": facts.weight_bytes,
            "kv": facts.kv,
            "work": [(w.macs, w.bytes, w.cache_bytes) for w in facts.work],
            "roofs": roofs,
            "speeds": speeds,
        }


def _peer_once(path: str, peer: Peer, threads: int, settings: Settings) -> Outcome:
    job: dict[str, Any] = {"peer": peer.name, "model": peer.model or path, "threads": threads}
    # Room for whole batches: some peers round the context down.
    job |= {"context": settings.context + 256, "cases": settings.cases}
    job |= {"enough": ENOUGH, "most": MOST, "kv": settings.kv}
    try:
        answer = _run([peer.python, str(_RUNNER), json.dumps(job)], None)
        if "error" in answer:
            raise UnsupportedError(answer["error"], what=peer.name)
    except EdgeError as e:
        return Outcome(error=str(e))
    return Outcome(answer["build"], tuple(answer["speeds"]))


def _run(command: list[str], env: dict[str, str] | None) -> dict[str, Any]:
    """The JSON object that a process prints. Raises UnsupportedError if it prints none."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, env=env, errors="replace")
    except OSError as e:
        raise UnsupportedError(f"cannot start {command[0]}: {e.strerror}", what=command[0]) from e
    lines = process.stdout.strip().splitlines()
    try:
        result = json.loads(lines[-1]) if process.returncode == 0 and lines else None
    except ValueError:
        result = None
    if isinstance(result, dict):
        return result
    code = process.returncode
    message = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
    end = f"signal {-code}" if code < 0 else f"code {code}"
    raise UnsupportedError(f"{Path(command[0]).name} ended with {end}: {message}", what=command[0])
