"""An exported folder on the CPU: edge beside onnxruntime-genai, and beside its own kernels.

    edge-run export MODEL.gguf -o build/exported --dialect cpu
    python tests/bench/exported.py MODEL.gguf build/exported

The folder must be of that model. All run on one thread; speeds are tokens per second of processor
time, which other work on the machine hardly changes. Each round runs every runtime in a fresh
process, the first of them changing, and a ratio is taken inside a round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import numpy as np

from edge.bench.ours import Ours
from edge.bench.runner import BATCH, Case, seconds, warm_up
from edge.device.cores import cpu_name

CASES = (
    Case("prompt", 66),
    Case("prompt", 512),
    Case("decode", 128, 64),
    Case("decode", 128, 1024),
)
CONTEXT = max(case.depth + case.tokens for case in CASES)
TIMES = 3  # that a case is measured in a process; the median counts
OURS = "edge"


class Exported(Ours):
    """The folder by edge's own runner."""

    def __init__(self, folder: str) -> None:
        from edge.onnx.run.engine import OnnxEngine

        self.engine: Any = OnnxEngine.load(folder, context=CONTEXT, threads=1)
        self.n_vocab, self.batch = self.engine.n_vocab, min(self.engine.chunk, BATCH)
        self._caches, self._depth = {}, 0


class Genai:
    """The folder by onnxruntime-genai; a token is appended, not sampled, as by the others."""

    batch = BATCH

    def __init__(self, folder: str) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(folder)
        options = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(max_length=CONTEXT + 1, min_length=CONTEXT + 1)
        self._generator = onnxruntime_genai.Generator(self._model, params)
        layout = json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8"))
        self.n_vocab = int(layout["model"]["vocab_size"])

    def build(self) -> str:
        """Package and version."""
        return f"onnxruntime-genai {importlib.metadata.version('onnxruntime-genai')}"

    def cut(self, n_tokens: int, depth: int) -> int:
        """See `runner.Runtime`; one context serves all depths."""
        if self._generator.token_count() > n_tokens:
            self._generator.rewind_to(n_tokens)
        return int(self._generator.token_count())

    def append(self, tokens: Sequence[int], start: int, last: bool) -> None:
        """See `runner.Runtime`."""
        assert self._generator.token_count() == start
        self._generator.append_tokens(np.array(tokens, np.int32))
        if last:
            self._generator.get_logits()  # as edge's runs return them


def run(name: str, model: str, folder: str) -> dict[str, Any]:
    """Measure one runtime in this process: build, and speeds by case."""
    if name == "native":
        runtime: Any = Ours(model, 1, CONTEXT)
    else:
        runtime = Exported(folder) if name == OURS else Genai(folder)
    warm_up(runtime, CASES)
    speeds = []
    for case in CASES:
        taken = [seconds(runtime, case, time.process_time) for _ in range(TIMES)]
        speeds.append(case.tokens / statistics.median(taken))
    return {"build": runtime.build(), "speeds": speeds}


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of the rounds' ratios, and the extremes."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def markdown(speeds: dict[str, list[list[float]]]) -> str:
    """A row for each case. speeds: runtime -> of each round, by case."""
    others = [name for name in speeds if name != OURS]
    titles = ["test", "edge", *(part for name in others for part in (name, f"to {name}"))]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for i, case in enumerate(CASES):
        own = {name: [one[i] for one in rounds] for name, rounds in speeds.items()}
        cells = [str(case), f"{statistics.median(own[OURS]):.1f}"]
        for name in others:
            cells += [f"{statistics.median(own[name]):.1f}", ratio(own[OURS], own[name])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one runtime, in this process
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, keep the rounds."""
    args = arguments()
    if args.run:
        print(json.dumps(run(args.run, args.model, args.folder)))
        return
    names = [OURS, "genai", "native"]
    speeds: dict[str, list[list[float]]] = {name: [] for name in names}
    builds: dict[str, str] = {}
    for i in range(args.rounds):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            print(f"round {i + 1}/{args.rounds}, {name}", file=sys.stderr)
            command = [sys.executable, __file__, args.model, args.folder, "--run", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            got = json.loads(done.stdout.splitlines()[-1])
            builds[name] = got["build"]
            speeds[name].append(got["speeds"])
    if args.json:
        result = {"cpu": cpu_name(), "builds": builds, "cases": CASES, "speeds": speeds}
        args.json.write_text(json.dumps(result, indent=1))
    print(f"- CPU: {cpu_name()}, one thread, {args.rounds} rounds; tokens per second of its time")
    print("\n".join(f"- {name}: {build}" for name, build in builds.items()) + "\n")
    print(markdown(speeds))


if __name__ == "__main__":
    main()
