"""What sessions save: a chat's next turn, a resumed session, a kept system prompt, a long run.

    python tests/bench/sessions.py [MODEL.gguf] [--only turn,resume,prefix,stop,slide] [--json FILE]

What is compared takes turns, and never shares its tokens with what was measured before: a number at
the start of each text makes all of it new to the cache. `stop` and
`slide` are long runs of a tiny model that is made for them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import edge
from edge.device.cores import cpu_name
from edge.disk.pull import default_model

TESTS = Path(__file__).resolve().parent.parent
TEXT = (TESTS / "data" / "english.txt").read_text(encoding="utf-8")
GREEDY = edge.SamplingOptions(temperature=0.0)
QUESTION = "Say in a few words what all of that was about."
Row = dict[str, Any]


def text_of(model: edge.Model, n_tokens: int, number: int) -> str:
    """About n_tokens tokens of text that no other number begins with."""
    start = f"{number} is the number of this text. "
    ids = model.tokenizer.encode(TEXT)
    ids = (ids * (n_tokens // len(ids) + 1))[: n_tokens - len(model.tokenizer.encode(start))]
    return start + str(model.tokenizer.decode(ids))


def first_token(stream: Callable[[], edge.Stream]) -> float:
    """Seconds from the call to its first piece."""
    start = time.perf_counter()
    with stream() as pieces:
        next(pieces)
        return time.perf_counter() - start


def compared(what: str, against: str, rounds: list[tuple[float, float]]) -> Row:
    """A row of two times, (with, without) by round."""
    fast, slow = zip(*rounds, strict=True)
    shares = [a / b for a, b in rounds]
    row: Row = {"what": what, "against": against, "seconds": fast, "against_seconds": slow}
    row |= {"median": statistics.median(fast), "against_median": statistics.median(slow)}
    row |= {"share": statistics.median(shares), "share_min": min(shares), "share_max": max(shares)}
    return row


# ---- a chat's second turn ------------------------------------------------------------------------


def measure_turn(path: str, args: argparse.Namespace) -> list[Row]:
    """The first token of a second turn: the session knows the history, or has to compute it."""
    rounds = []
    with edge.load(path, context=args.tokens + 256, threads=args.threads) as model:
        for i in range(args.rounds + 1):
            with model.chat(sampling=GREEDY) as warm, model.chat(sampling=GREEDY) as cold:
                warm.send(text_of(model, args.tokens, 2 * i), max_tokens=16)
                answer = warm.messages[1]
                asked = {"role": "user", "content": text_of(model, args.tokens, 2 * i + 1)}
                cold.messages[:] = [asked, dict(answer)]
                times = [first_token(lambda c=chat: c.stream(QUESTION)) for chat in (warm, cold)]
            rounds.append((times[0], times[1]))
    what = f"first token of a chat's second turn, history of {args.tokens:,} tokens"
    return [compared(what, "history computed", rounds[1:])]


# ---- resume --------------------------------------------------------------------------------------


def measure_resume(path: str, args: argparse.Namespace) -> list[Row]:
    """A session out of a file, by a process that never saw it, or computed from its tokens."""
    load = {"context": args.tokens + 256, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, f"{i}.session")) for i in range(args.rounds + 1)]
        with edge.load(path, **load) as model:
            for i, file in enumerate(files):
                with model.session(sampling=GREEDY) as session:
                    session.generate(text_of(model, args.tokens, 2 * i), max_tokens=1)
                    session.save(file)
        resumed, continued = [], []
        with edge.load(path, **load) as model:
            for i, file in enumerate(files):
                start = time.perf_counter()
                with edge.resume(file, model) as session:
                    ready = time.perf_counter() - start
                    token = ready + first_token(lambda s=session: s.stream([], max_tokens=1))
                text = text_of(model, args.tokens, 2 * i + 1)
                with model.session(sampling=GREEDY) as session:
                    anew = first_token(lambda s=session, t=text: s.stream(t, max_tokens=1))
                resumed.append((ready, anew))
                continued.append((token, anew))
        n_bytes = os.path.getsize(files[0])
    what = f"a session of {args.tokens:,} tokens resumed"
    row = compared(what, "computed", resumed[1:]) | {"file_bytes": n_bytes}
    return [row, compared(f"{what}, and its next token", "computed", continued[1:])]


# ---- a system prompt kept on disk ----------------------------------------------------------------


def measure_prefix(path: str, args: argparse.Namespace) -> list[Row]:
    """The first answer of a fresh process, its system prompt in a folder or not."""
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        job: Row = {"path": path, "tokens": args.tokens, "threads": args.threads}
        child("ask", job | {"folder": folder, "keep": True, "question": "Who are you?"})
        for _ in range(args.rounds + 1):
            kept, anew = (child("ask", job | {"folder": f, "keep": False}) for f in (folder, None))
            rounds.append((kept["seconds"], anew["seconds"]))
    what = f"first token after a start, system prompt of {args.tokens:,} tokens kept on disk"
    return [compared(what, "computed", rounds[1:])]


def ask(job: Row) -> Row:
    """In a process of its own: one answer; keep: its system prompt goes into the folder."""
    load = {"context": job["tokens"] + 256, "threads": job["threads"]}
    if job["folder"] is not None:
        load["prefix_cache"] = job["folder"]
    with edge.load(job["path"], **load) as model:
        system = text_of(model, job["tokens"], 0)
        with model.chat(system=system, sampling=GREEDY) as chat:
            question = job.get("question", QUESTION)
            seconds = first_token(lambda: chat.stream(question, max_tokens=1))
            if job["keep"]:
                chat.session.keep(len(model.tokenizer.encode(system)))
    return {"seconds": seconds}


# ---- a long run ----------------------------------------------------------------------------------


def measure_stop(_: str, args: argparse.Namespace) -> list[Row]:
    """One answer of many tokens by a tiny model, with a context for all of it."""
    return [measure_long(args, args.long + 64, "stop")]


def measure_slide(_: str, args: argparse.Namespace) -> list[Row]:
    """The same with a small context whose window slides."""
    return [measure_long(args, args.window, "slide")]


def measure_long(args: argparse.Namespace, context: int, when_full: str) -> Row:
    """A process of its own, whose memory is looked at on the way."""
    from tiny import write_tiny

    with tempfile.TemporaryDirectory() as folder:
        options = {"context": 2 * args.long, "type": "Q8_0", "n_layers": 4, "head_dim": 32}
        tiny = str(write_tiny(Path(folder, "tiny.gguf"), "llama", **options))
        job = {"path": tiny, "tokens": args.long, "every": args.every, "threads": args.threads}
        return child("long_run", job | {"context": context, "when_full": when_full})


def long_run(job: Row) -> Row:
    """In a process of its own: samples of (tokens, tokens/s since the last, resident bytes).

    beyond: how many bytes more were resident at the end than at the first sample, less the pages
    of the cache that were touched in between.
    """
    with edge.load(job["path"], context=job["context"], threads=job["threads"]) as model:
        options: Row = {} if job["when_full"] == "stop" else {"when_full": job["when_full"]}
        biases = dict.fromkeys(model.tokenizer.eos_ids, -100.0)  # it shall not end by itself
        sampling = edge.SamplingOptions(logit_bias=biases)
        samples, depth = [], 0
        with model.session(**options) as session:
            pieces = session.stream("Hello", max_tokens=job["tokens"], sampling=sampling)
            first, then = None, time.perf_counter()
            for piece in pieces:
                depth += piece.token is not None
                if piece.token is None or depth % job["every"]:
                    continue
                now, resident = time.perf_counter(), memory("VmRSS")
                samples.append((depth, job["every"] / (now - then), resident))
                first, then = first or resident, time.perf_counter()
            used = [min(d, job["context"]) for d, _, _ in (samples[0], samples[-1])]
            pages = model.engine.cache_bytes(used[1]) - model.engine.cache_bytes(used[0])
            finish = pieces.finish_reason
        row = {name: job[name] for name in ("when_full", "context", "tokens")}
        row |= {"finish_reason": finish, "generated": depth, "samples": samples}
        beyond = samples[-1][2] - samples[0][2] - pages
        return row | {"pages": pages, "beyond": beyond, "peak": memory("VmHWM")}


def memory(name: str) -> int:
    """Bytes of this process, out of /proc: VmRSS, VmHWM."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


# ---- around it -----------------------------------------------------------------------------------

PARTS: dict[str, Callable[[str, argparse.Namespace], list[Row]]] = {
    "turn": measure_turn,
    "resume": measure_resume,
    "prefix": measure_prefix,
    "stop": measure_stop,
    "slide": measure_slide,
}
CHILDREN = {"ask": ask, "long_run": long_run}


def child(name: str, job: Row) -> Row:
    """What a function gives in a process of its own."""
    command = [sys.executable, __file__, "--child", name, json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with code {done.returncode}")
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(results: dict[str, list[Row]]) -> str:
    """What was compared, and the long runs."""
    lines: list[str] = []
    every = [row for rows in results.values() for row in rows]
    rows, runs = ([row for row in every if ("samples" in row) == long] for long in (False, True))
    if rows:
        lines += ["| | seconds | against | seconds | share | lowest to highest |"]
        lines += ["| --- | ---: | --- | ---: | ---: | ---: |"]
    for row in rows:
        spread = f"{row['share_min']:.3f} to {row['share_max']:.3f}"
        lines.append(
            f"| {row['what']} | {row['median']:.4f} | {row['against']} | "
            f"{row['against_median']:.4f} | **{row['share']:.3f}** | {spread} |"
        )
    if runs:
        lines += [
            "",
            "| when full | context | tokens | tokens/s, first and last | resident, first ",
        ]
        lines[-1] += "and last | peak | pages touched since | all else |"
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in runs:
        (_, speed, start), (_, last_speed, end) = row["samples"][0], row["samples"][-1]
        sizes = [f"{n / 2**20:.1f} MiB" for n in (start, end, row["peak"], row["pages"])]
        lines.append(
            f"| {row['when_full']} | {row['context']:,} | {row['generated']:,} | {speed:,.0f}, "
            f"{last_speed:,.0f} | {sizes[0]}, {sizes[1]} | {sizes[2]} | {sizes[3]} | "
            f"{row['beyond'] / 2**20:+.1f} MiB |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "model", nargs="?", metavar="MODEL.gguf", help="the default one unless given"
    )
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...")
    parser.add_argument(
        "--tokens", type=int, default=2000, help="of a history, a session, a prompt"
    )
    parser.add_argument("--rounds", type=int, default=5, help="after one that does not count")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--long", type=int, default=32_768, help="tokens of a long run")
    parser.add_argument("--every", type=int, default=2048, help="tokens between looks at it")
    parser.add_argument("--window", type=int, default=1024, help="the context that slides")
    parser.add_argument("--json", type=Path, help="write all rounds here")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"no part {min(unknown)!r}: {', '.join(PARTS)}")
    if args.long < args.every or args.tokens < 64:
        parser.error("at least 64 tokens, and a long run as long as --every")
    return args


def main() -> None:
    """Measure, print the tables, keep the rounds."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](json.loads(sys.argv[3]))))
        return
    args, results = arguments(), {}
    path = args.model or str(default_model())
    for part in args.only:
        print(part, file=sys.stderr)
        results[part] = PARTS[part](path, args)
        if args.json:
            whole = {"model": path, "cpu": cpu_name(), "rounds": args.rounds, "results": results}
            args.json.write_text(json.dumps(whole, indent=1))
    print(f"- CPU: {cpu_name()}\n- {args.rounds} rounds, medians\n\n{markdown(results)}")


if __name__ == "__main__":
    main()
