"""Which file of a model to take on this device: what fits, how fast it will be, what it costs.

Sizes and speeds are computed from headers and from what this machine's matmuls do, see
`edge.engine.predict`. What a type costs in quality is an estimate, see `WEIGHT_ERRORS`.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from edge import check, native
from edge.bench import Case, Settings, measure
from edge.bench.tune import MOST_OTHERS, Times
from edge.device import cores
from edge.device.budget import budget_of
from edge.engine.engine import DescribedFile
from edge.engine.ledger import Ledger
from edge.engine.predict import Bandwidth, Demand, demand_of, tokens_per_second
from edge.errors import EdgeError, MemoryBudgetError, ModelFileError
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.hub.at_hand import AtHand, choices
from edge.loading import Loading, NativeOptions
from edge.native import lib
from edge.sizes import show
from edge.weights.packed import Item

__all__ = ["DEPTHS", "WEIGHT_ERRORS", "Advice", "AdviceLimits", "Family", "FileAdvice", "advise"]

DEPTHS = (0, 4096, 32768)  # tokens before the one whose speed is predicted
NOTICED = 0.02  # error of weights below which nobody tells files apart
ROUNDS, TOKENS = 5, 32  # of a verification

#: Type -> the error of its weights: the root mean square of what rounding takes from weights of a
#: normal distribution (256 rows of 1,024), relative to theirs, with ggml's own quantisers and an
#: importance matrix of ones. An estimate of what a type costs: measured damage to answers, by model
#: and recipe, may take its place. Types that models are trained in have none.
WEIGHT_ERRORS = {
    "F32": 0.0,
    "F16": 0.0002,
    "BF16": 0.0017,
    "Q8_0": 0.0054,
    "Q6_K": 0.0173,
    "Q5_K": 0.0354,
    "Q5_1": 0.0338,
    "Q5_0": 0.0405,
    "Q4_K": 0.0709,
    "Q4_1": 0.0700,
    "IQ4_NL": 0.0750,
    "IQ4_XS": 0.0757,
    "Q4_0": 0.0818,
    "Q3_K": 0.1447,
    "IQ3_S": 0.1369,
    "IQ3_XXS": 0.1815,
    "Q2_K": 0.2684,
    "IQ2_S": 0.2490,
    "IQ2_XS": 0.2995,
    "IQ2_XXS": 0.3435,
    "IQ1_M": 0.4512,
    "IQ1_S": 0.4856,
}
_FLOATS = ("F32", "F16", "BF16")

#: Called with a line for people, before something takes long.
Say = Callable[[str], object]


@dataclass(frozen=True)
class Family:
    """What files of one model have in common."""

    name: str
    architecture: str
    n_layers: int
    dim: int


@dataclass(frozen=True)
class FileAdvice:
    """What a file costs and gives.

    type: by its name, else that of most of its weights. problem: why it is no choice, "": it is
    one; all that follows is then known. bits: per weight of its matrices; error: of its weights,
    estimated, None: unknown; ledger: the memory that it takes; speeds: predicted tokens per second
    by depth, for those depths whose context fits; empty where this machine could not be measured;
    measured: tokens per second at depth 0, of a verification.
    """

    at_hand: AtHand
    type: str
    problem: str = ""
    family: Family | None = None
    bits: float = 0.0
    error: float | None = None
    ledger: Ledger | None = None
    demand: Demand | None = None
    speeds: tuple[tuple[int, float], ...] = ()
    measured: float | None = None

    @property
    def name(self) -> str:
        """What MODEL may be for it."""
        return self.at_hand.name

    @property
    def n_bytes(self) -> int:
        """Of the file, of all shards."""
        return self.at_hand.offer.n_bytes

    @property
    def fits(self) -> bool:
        """Whether it runs, in the memory that there is."""
        return self.ledger is not None and self.ledger.fits

    @property
    def speed(self) -> float | None:
        """Predicted tokens per second at depth 0."""
        return dict(self.speeds).get(0)

    @property
    def off(self) -> float | None:
        """The error of the prediction, as a share of what was measured; above 0: too fast."""
        if self.measured is None or self.speed is None:
            return None
        return self.speed / self.measured - 1


@dataclass(frozen=True)
class Advice:
    """The files of one family, those of the least error first. family: None: of files that cannot
    be read. recommended: None: nothing fits; reason: one sentence.
    """

    family: Family | None
    files: tuple[FileAdvice, ...]
    recommended: FileAdvice | None
    reason: str


@dataclass(frozen=True)
class AdviceLimits:
    """What a file must keep to. memory, context, threads: see `edge.loading.Loading`; min_speed:
    tokens per second at depth 0 that it must be predicted to decode.
    """

    memory: int | str | None = None
    context: int | None = None
    threads: int | None = None
    min_speed: float | None = None


def advise(
    model: str | None = None,
    limits: AdviceLimits | None = None,
    *,
    verify: bool = False,
    say: Say = lambda line: None,
) -> list[Advice]:
    """Advice for each family of models that MODEL stands for, see `edge.hub.at_hand.choices`.

    verify: measure those on this machine that fit. say(line): is told before something takes long.
    Of files on servers headers are fetched, and only of those that are no larger than the memory.

    Raises InputError for a wrong value or nothing to advise on, MemoryBudgetError for a budget
    above the available memory, and the errors of `edge.hub.at_hand.choices`.
    """
    limits = limits or AdviceLimits()
    min_speed = check.optional(check.number, "min_speed", limits.min_speed, 0.0, 1e6)
    loading = {name: getattr(limits, name) for name in ("memory", "context", "threads")}
    options, found = Loading.of(loading).native, choices(model)
    files = [_described(at_hand, options, say) for at_hand in _small(found.models, options, say)]
    left = {file.name for file in files}
    files += [
        FileAdvice(m, m.offer.type, "it is larger than the memory, so its header was not fetched")
        for m in found.models
        if m.name not in left
    ]
    if found.asked is not None:
        files = [file for file in files if file.family == files[0].family or file is files[0]]
        files = files[:1] if files[0].family is None else files
    files = _predicted(files, cores.choose(options.threads).threads, say)
    if verify:
        cpus = [cpu for cluster in cores.Cores.now().clusters for cpu in cluster.cpus]
        before = Times.now(cpus)
        files = [_verified(file, options, say) for file in files]
        after = Times.now(cpus)
        others = after.others_since(before) if before and after else 0.0
        if others > MOST_OTHERS:
            say(
                f"other programs took {others:.0%} of the processors' time meanwhile: what was "
                "measured is too slow, and the errors mean little"
            )
    return [_advice(group, min_speed) for group in _families(files)]


def _small(models: Sequence[AtHand], options: NativeOptions, say: Say) -> list[AtHand]:
    """The models whose headers are worth reading: all on this machine, and of others those that
    may fit, or the smallest.
    """
    budget = budget_of(options.memory)
    remote = [m for m in models if m.path is None]
    small = [m for m in remote if budget is None or m.offer.n_bytes <= budget]
    small = small or sorted(remote, key=lambda m: m.offer.n_bytes)[:1]
    if small:
        say(f"reading {len(small)} of {len(remote)} headers")
    return [m for m in models if m.path is not None or m in small]


def _described(at_hand: AtHand, options: NativeOptions, say: Say) -> FileAdvice:
    """What the header of a file says; any error of edge becomes its problem."""
    offer = at_hand.offer
    try:
        with (
            at_hand.header() as path,
            DescribedFile.open(path, options, header_only=True) as described,
        ):
            if described.file.whole_bytes > offer.n_bytes:
                raise ModelFileError("it is cut off", path=at_hand.name)
            description, metadata = described.description, described.file.metadata
            config = description.config
            name = str(metadata.get("general.name") or "")
            items = [item for item in description.weights.model.items() if len(item.shape) > 1]
            return FileAdvice(
                at_hand,
                offer.type or _main_type(items),
                family=Family(name, config.architecture, config.n_layers, config.dim),
                bits=_bits(items),
                error=_error(items),
                ledger=replace(description.ledger, path=at_hand.name),
                demand=demand_of(description),
            )
    except EdgeError as error:
        return FileAdvice(at_hand, offer.type, str(error))


def _main_type(items: Sequence[Item]) -> str:
    sizes = Counter[str]()
    for item in items:
        sizes[item.type] += math.prod(item.shape)
    return sizes.most_common(1)[0][0] if sizes else ""


def _bits(items: Sequence[Item]) -> float:
    """Bits per weight in the file."""
    bits = total = 0.0
    for item in items:
        kind, n = TENSOR_TYPES[TYPE_NUMBERS[item.type]], math.prod(item.shape)
        bits, total = bits + 8 * n * kind.block_bytes / kind.block, total + n
    return bits / total if total else 0.0


def _error(items: Sequence[Item]) -> float | None:
    """The error of all weights; None where that of a type is unknown."""
    squares = total = 0.0
    for item in items:
        if item.type not in WEIGHT_ERRORS:
            return None
        n = math.prod(item.shape)
        squares, total = squares + n * WEIGHT_ERRORS[item.type] ** 2, total + n
    return math.sqrt(squares / total) if total else None


# ---- speed ---------------------------------------------------------------------------------------


def _predicted(files: list[FileAdvice], threads: int, say: Say) -> list[FileAdvice]:
    """The files with their speeds; without where there is no memory to measure this machine."""
    products = {p for file in files if file.fits and file.demand for p in file.demand.products}
    if not products:
        return files
    say(f"measuring matmuls of {len({p.layout for p in products})} layouts")
    try:
        measured = Bandwidth.now(threads, products)
    except MemoryBudgetError as error:
        say(f"no speed is predicted: {error}")
        return files
    with suppress(EdgeError, OSError):  # a home folder that is missing or full
        measured.store()
    return [replace(file, speeds=_speeds(file, measured)) for file in files]


def _speeds(file: FileAdvice, measured: Bandwidth) -> tuple[tuple[int, float], ...]:
    if file.demand is None or file.ledger is None or not file.fits:
        return ()
    most = file.ledger.largest_context()
    depths = [depth for depth in DEPTHS if depth == 0 or depth < most]
    return tuple((d, tokens_per_second(file.demand, d, measured)) for d in depths)


def _verified(file: FileAdvice, options: NativeOptions, say: Say) -> FileAdvice:
    """The file with its measured speed; unchanged where it does not fit or is not here.

    The median counts: a prediction is to be held against what a user gets.
    """
    path = file.at_hand.path
    if not file.fits or path is None:
        return file
    say(f"measuring {file.name}")
    cases = (Case("decode", TOKENS),)
    loading = {"memory": options.memory}
    settings = Settings(cases, (options.threads,), ROUNDS, options=loading)
    try:
        (result,) = measure(path, settings)
    except EdgeError as error:  # the header promised more than the data keep
        return replace(file, problem=str(error), ledger=None, speeds=())
    speeds = [outcome.speeds[0] for outcome in result.rounds["edge"]]
    return replace(file, measured=statistics.median(speeds))


# ---- the recommendation --------------------------------------------------------------------------


def _families(files: list[FileAdvice]) -> list[list[FileAdvice]]:
    """The files by family. Those that cannot be read are of the only family, if there is one."""
    groups: dict[Family | None, list[FileAdvice]] = {}
    for file in files:
        groups.setdefault(file.family, []).append(file)
    if len(groups) == 2 and None in groups:
        broken = groups.pop(None)
        next(iter(groups.values())).extend(broken)
    return list(groups.values())


def _advice(files: list[FileAdvice], min_speed: float | None) -> Advice:
    ordered = tuple(sorted(files, key=_rank))
    best, reason = _recommended(ordered, min_speed)
    family = next((file.family for file in ordered if file.family is not None), None)
    return Advice(family, ordered, best, reason)


def _rank(file: FileAdvice) -> tuple[bool, float, float, int]:
    """The best first: those that run, by error, as far as one notices it; then the fastest."""
    error = 1.0 if file.error is None else max(file.error, NOTICED)
    return file.family is None, error, -(file.speed or 0.0), file.n_bytes


def _recommended(
    files: Sequence[FileAdvice], min_speed: float | None
) -> tuple[FileAdvice | None, str]:
    """The best file that fits and is fast enough, and why; files: the best first."""
    fitting = [file for file in files if file.fits]
    if not fitting:
        return None, _nothing_fits(files)
    among = f"of the {len(fitting)} that fit" if len(fitting) > 1 else "the only one that fits"
    fast = fitting
    if min_speed is not None and all(file.speed is not None for file in fitting):
        fast = [file for file in fitting if (file.speed or 0.0) >= min_speed]
        if not fast:
            best = max(fitting, key=lambda file: file.speed or 0.0)
            return best, (
                f"none of them is predicted to decode {min_speed:g} tokens/s: {_label(best)} comes "
                f"nearest with {best.speed:.1f}{_floats(best, files)}"
            )
        if len(fitting) > 1:
            among += f" and reach {min_speed:g} tokens/s"
    best = fast[0]
    speed = "" if best.speed is None else f", at {best.speed:.1f} tokens/s"
    if len(fitting) == 1:
        return best, f"{_label(best)} is {among}{speed}{_floats(best, files)}"
    if best.error is None:
        return best, f"{_label(best)} is the fastest {among}{speed}{_floats(best, files)}"
    error = f"the least error of weights ({best.error:.1%}, estimated)"
    if best.error < NOTICED:
        error = f"no error of weights that is noticed ({best.error:.1%}, estimated)"
        among = f"and is the fastest such {among}" if best.speed else among
    return best, f"{_label(best)} has {error} {among}{speed}{_floats(best, files)}"


def _label(file: FileAdvice) -> str:
    return file.type or file.name


def _nothing_fits(files: Sequence[FileAdvice]) -> str:
    """What comes nearest, and what would make it fit."""
    ledgers = [file for file in files if file.ledger is not None]
    if not ledgers:
        return f"none of these can be run: {files[0].problem}"
    nearest = min(ledgers, key=lambda file: file.ledger.needed if file.ledger else 0)
    ledger = nearest.ledger
    assert ledger is not None and ledger.budget is not None
    options = ledger.options()
    least = ledger.least()
    hint = f"it fits with {options[0].flags} ({show(options[0].needed)})" if options else ""
    if not options:
        flags = f", with {least.flags}" if least.flags else ""
        hint = f"the least that it runs in is {show(least.needed)}{flags}"
    return (
        f"nothing fits {show(ledger.budget)}: {_label(nearest)} comes nearest and needs "
        f"{show(ledger.needed)}; {hint}"
    )


def _floats(best: FileAdvice, files: Sequence[FileAdvice]) -> str:
    """What this CPU makes of 16-bit floats, where a file at hand has them; else nothing."""
    floats = [f for f in files if f.type in _FLOATS[1:] and f.demand is not None]
    if not floats:
        return ""
    has = bool(lib.edge_isa_has_bf16(native.isa_index()))
    cpu = (
        "this CPU has products of bfloat16 (EDGE_NATIVE_BF16=1), which make prompts faster"
        if has
        else "this CPU has no products of bfloat16 and widens 16-bit floats to float32"
    )
    if best in floats or best.demand is None:
        return f"; {cpu}"
    other = min(floats, key=lambda file: file.n_bytes)
    assert other.demand is not None
    times = other.demand.weights / best.demand.weights
    return f"; {cpu}, and a token of {other.type} reads {times:.1f} times the bytes"
