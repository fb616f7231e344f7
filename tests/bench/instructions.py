"""Instructions per token of one layer on 64-bit ARM, as QEMU counts them.

    sh scripts/boards -k instructions                        # fetches and builds what this needs
    python tests/bench/instructions.py                       # of a small layer
    python tests/bench/instructions.py --update              # and keep them in instructions.json
    python tests/bench/instructions.py --llama FOLDER        # the table of README.md
    python tests/bench/instructions.py --functions libedge.so

A model of two layers less one of one layer: start-up, embedding and head cancel out, and what is
left is a whole layer, while of the last one a prompt runs only the last token. One thread, so two
runs count the same. FOLDER: llama.cpp's libraries for 64-bit ARM. --functions: the same small layer
by function, of a library that has symbols.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "boards"))
import make_shape
from builds import wheel_for
from machines import BOARDS, BOOKWORM, ROOT

from edge.engine.engine import Engine
from edge.native import ffi

SOURCES = Path(__file__).resolve().parent / "instructions"
KNOWN = Path(__file__).resolve().parent / "instructions.json"
COMPILER = "aarch64-linux-gnu-gcc"
#: Instruction set -> a CPU of QEMU 7.2 whose best it is. The last is like a Cortex-A710.
CPUS = {
    "neon": "cortex-a72",
    "dotprod": "cortex-a76",
    "i8mm": "max,sme=off,sve-default-vector-length=16",
}
KINDS = ("Q4_0", "IQ3_S")
PHASES = {"prompt": 64, "decode": 4}  # tokens: of a prompt in one piece, and behind it
PHI = make_shape.Shape(vocab=512)
SMALL = make_shape.Shape(dim=768, ffn=2048, heads=6, kv_heads=2, vocab=512)
#: At most so many times llama.cpp's instructions.
AIMS = {
    ("Q4_0", "prompt"): 0.8,
    ("Q4_0", "decode"): 1.0,
    ("IQ3_S", "prompt"): 0.35,
    ("IQ3_S", "decode"): 0.35,
}
RISE = 0.03  # more than that is a failure

Case = tuple[str, str]  # kind, instruction set
Counts = dict[str, Counter[int]]  # phase -> address, counted from the library's -> instructions


@dataclass(frozen=True)
class Program:
    """What runs under QEMU, with the arguments before those of each run."""

    command: tuple[str | Path, ...]
    suffix: str  # of the files it takes
    libraries: Path


class Bench:
    """The emulator, its plugin and the programs, in a folder that goes away with them."""

    def __init__(self, folder: Path, shape: make_shape.Shape) -> None:
        self.folder, self.shape = folder, shape
        self.counter = BOARDS / "counter"
        if not self.counter.exists() or not BOOKWORM.root.exists():
            raise FileNotFoundError(f"{self.counter} is not there: run scripts/boards")
        (self.loader,) = self.counter.glob("usr/lib/*/ld-linux*.so.*")
        self.plugin = folder / "plugin.so"
        run("cc", "-O2", "-shared", "-fPIC", SOURCES / "plugin.c", "-o", self.plugin)

    def edge(self, library: Path) -> Program:
        """Our driver."""
        include = f"-I{ROOT / 'native'}"
        out = self.folder / "run-edge"
        run(COMPILER, "-O2", include, SOURCES / "edge.c", library, "-o", out)
        return Program((out,), "plan", library.parent)

    def llama(self, libraries: Path) -> Program:
        """llama.cpp's driver."""
        out, ignore = self.folder / "run-llama", "-Wl,--unresolved-symbols=ignore-in-shared-libs"
        found = [*libraries.glob("libllama.*"), *libraries.glob("libggml.*")]
        run(COMPILER, "-O2", SOURCES / "llama.c", *found, ignore, "-o", out)
        return Program((out, libraries), "gguf", libraries)

    def write_models(self) -> None:
        """The files that the programs take."""
        for kind in KINDS:
            for layers in (1, 2):
                path = self._model(kind, layers, "gguf")
                make_shape.write(path, kind, layers=layers, head="Q8_0", shape=self.shape)
                write_plan(path, path.with_suffix(".plan"))

    def _model(self, kind: str, layers: int, suffix: str) -> Path:
        return self.folder / f"{kind}-{layers}.{suffix}"

    def count(self, program: Program, cases: list[Case]) -> dict[Case, Counts]:
        """A layer's instructions, of all tokens of a phase."""
        runs = [(program, case, layers) for case in cases for layers in (1, 2)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = dict(zip(runs, pool.map(self._run, runs), strict=True))
        out = {}
        for case in cases:
            one, two = (results[program, case, layers] for layers in (1, 2))
            for phase in PHASES:
                two[phase].subtract(one[phase])
            out[case] = two
        return out

    def _run(self, what: tuple[Program, Case, int]) -> Counts:
        program, (kind, isa), layers = what
        file = self._model(kind, layers, program.suffix)
        counted = self.folder / f"{file.name}-{isa}-{program.suffix}.counts"
        said = run(
            *(self.loader, "--library-path", self.loader.parent),
            *(self.counter / "usr" / "bin" / "qemu-aarch64", "-cpu", CPUS[isa]),
            *("-L", BOOKWORM.root, "-E", f"LD_LIBRARY_PATH={program.libraries}"),
            *("-plugin", f"{self.plugin},out={counted}"),
            *(*program.command, file, *map(str, PHASES.values())),
        )
        base = 0
        if program.suffix == "plan":
            found, address = said.split()
            base = int(address, 16)
            if found != isa:
                raise ValueError(f"it took {found} on {CPUS[isa]}, not {isa}")
        return dict(zip(PHASES, read_phases(counted, base), strict=True))


def run(*command: str | Path) -> str:
    """Run to the end; standard output. Raises RuntimeError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    if done.returncode:
        raise RuntimeError(f"{command}: code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def read_phases(path: Path, base: int) -> Iterator[Counter[int]]:
    """What was executed before each mark but the first."""
    parts = path.read_text().split("mark ")[2:]
    for part in parts:
        counts: Counter[int] = Counter()
        for line in part.splitlines()[1:]:
            address, instructions, times = line.split()
            counts[int(address, 16) - base] += int(instructions) * int(times)
        yield counts


def write_plan(model: Path, target: Path) -> None:
    """An edge_plan_spec for edge.c and all that it points to; pointers are offsets in the file."""
    engine = Engine.load(model, threads=1)
    spec, (ops, buffers, shapes, _) = engine._spec(0, engine._weights.entries())
    weights = ffi.new("edge_weight[]", spec.n_weights)
    ffi.memmove(weights, spec.weights, ffi.sizeof(weights))
    with target.open("wb") as file:

        def put(data: Any) -> int:
            start = -(-file.tell() // 64) * 64
            file.seek(start)
            file.write(data)
            return start

        put(ffi.buffer(spec))
        for weight in weights:
            weight.data = ffi.cast("void *", put(ffi.buffer(weight.data, weight.n_bytes)))
        spec.kv = ffi.cast("edge_kv_shape *", put(ffi.buffer(shapes)))
        spec.ops = ffi.cast("edge_op *", put(ffi.buffer(ops)))
        spec.buffers = ffi.cast("edge_buffer *", put(ffi.buffer(buffers)))
        spec.weights = ffi.cast("edge_weight *", put(ffi.buffer(weights)))
        file.seek(0)
        put(ffi.buffer(spec))
    engine.close()


def wheel_library(folder: Path) -> Path:
    """The library of the wheel in dist/: of a compiler that is the same everywhere."""
    with zipfile.ZipFile(wheel_for("manylinux*_aarch64")) as wheel:
        return Path(wheel.extract("edge/libedge.so", folder))


def per_token(counts: Counts) -> dict[str, int]:
    """Phase -> instructions of a token."""
    return {phase: round(c.total() / PHASES[phase]) for phase, c in counts.items()}


def count_small(library: Path | None = None) -> dict[Case, Counts]:
    """The small layer's instructions, in all. library: the wheel's unless given."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), SMALL)
        bench.write_models()
        edge = bench.edge((library or wheel_library(bench.folder)).resolve())
        return bench.count(edge, [(kind, isa) for kind in KINDS for isa in CPUS])


def rises(found: dict[Case, dict[str, int]]) -> list[str]:
    """What has risen above instructions.json, a line each; a case that is not in it, too."""
    known, lines = json.loads(KNOWN.read_text()), []
    for (kind, isa), phases in found.items():
        for phase, n in phases.items():
            before = known.get(kind, {}).get(isa, {}).get(phase, 0)
            if n > before * (1 + RISE):
                lines.append(f"{kind} {phase}, {isa}: {n:,} instructions a token, were {before:,}")
    return lines


def update(found: dict[Case, dict[str, int]]) -> None:
    """Write instructions.json."""
    tree: dict[str, dict[str, dict[str, int]]] = {}
    for (kind, isa), phases in found.items():
        tree.setdefault(kind, {})[isa] = phases
    KNOWN.write_text(json.dumps(tree, indent=4) + "\n")


def by_function(counts: Counter[int], library: Path) -> Counter[str]:
    """Function -> instructions; code outside of the library is one of them."""
    lines = run("nm", "--defined-only", "--numeric-sort", library).splitlines()
    symbols = [line.split(" ", 2) for line in lines]
    functions = [
        (int(at, 16), name) for at, kind, name in symbols if kind in "tT" and name[0] != "$"
    ]
    if not functions:
        raise ValueError(f"{library} has no symbols")
    end = library.stat().st_size
    out: Counter[str] = Counter()
    for address, n in counts.items():
        i = bisect.bisect_right(functions, (address, "\x7f")) - 1
        out[functions[i][1] if 0 <= address < end else "elsewhere"] += n
    return out


def print_functions(library: Path) -> None:
    """The most expensive functions of each case."""
    for (kind, isa), counts in count_small(library).items():
        for phase, c in counts.items():
            print(f"{kind} {phase}, {isa}: {c.total() // PHASES[phase]:,} instructions a token")
            for name, n in by_function(c, library).most_common(6):
                print(f"    {n / c.total():6.1%}  {name}")


def print_table(libraries: Path) -> None:
    """Phi-4-mini's layer, ours beside llama.cpp's."""
    cases = [(kind, isa) for kind in KINDS for isa in CPUS]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), PHI)
        bench.write_models()
        ours = bench.count(bench.edge(wheel_library(bench.folder)), cases)
        theirs = bench.count(bench.llama(libraries.resolve()), cases)
    print(
        "| | kernels | edge | llama.cpp | ratio | aim |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for (kind, phase), aim in AIMS.items():
        for isa in CPUS:
            a, b = (per_token(of[kind, isa])[phase] / 1e6 for of in (ours, theirs))
            print(f"| {kind} {phase} | {isa} | {a:.1f} | {b:.1f} | **{a / b:.2f}** | {aim:.2f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--update", action="store_true", help="write instructions.json")
    what.add_argument("--llama", type=Path, metavar="FOLDER", help="the table of README.md")
    what.add_argument("--functions", type=Path, metavar="LIBRARY", help="by function")
    args = parser.parse_args()
    os.environ["EDGE_CACHE_SIZE"] = "0"  # the models are gone when this ends
    if args.llama:
        return print_table(args.llama)
    if args.functions:
        return print_functions(args.functions.resolve())
    found = {case: per_token(counts) for case, counts in count_small().items()}
    if args.update:
        return update(found)
    for (kind, isa), phases in found.items():
        for phase, n in phases.items():
            print(f"{kind} {phase}, {isa}: {n:,}")
    if lines := rises(found):
        raise SystemExit("\n".join(["risen by more than 3 %:", *lines]))


if __name__ == "__main__":
    main()
