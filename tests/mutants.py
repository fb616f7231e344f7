"""Tiny models with something wrong in their metadata or tensors, and a child that tries them."""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
import random
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ggufbytes as raw
import tiny
from arches.common import Tiny

from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.models.keys import EXPERTS, NEUTRAL, READ, SAME

SECONDS = 60  # for one mutant, until its process is killed

#: Numbers at which something may overflow, be none, or be too much.
NUMBERS: tuple[float, ...] = (
    *(0, 1, 2, 3, 4, 5, 7, 16, 17, 32, 64, 100, 4095, 4096, 4097, 2**16, 2**24, 2**24 + 2),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63)),
    *(0.0, -0.0, 0.5, -1.5, 1e-300, 1e-45, 1e-30, 1e-5, 1e4, 1e6, 1e9, 3e38, 1e300, -1e5),
    *(math.inf, -math.inf, math.nan),
)
_STRINGS = ("", "none", "linear", "yarn", "longrope", "silu", "4", "nan", "é\n\x1b[31m", "x" * 300)
#: Names of tensors that an architecture may know, in layer 0 or outside the layers.
_NAMES = (
    *("output.weight", "output.bias", "output_norm.bias", "rope_freqs.weight", "token_embd.bias"),
    *("rope_factors_long.weight", "rope_factors_short.weight", "position_embd.weight"),
    *(f"blk.0.attn_{x}.{y}" for x in ("q", "k", "v", "qkv", "output") for y in ("bias", "scale")),
    *(f"blk.0.attn_{x}_norm.{y}" for x in ("q", "k", "sub") for y in ("weight", "bias")),
    *(f"blk.0.ffn_{x}.{y}" for x in ("gate", "up", "down") for y in ("weight", "bias", "scale")),
    *(f"blk.0.ffn_{x}_exps.{y}" for x in ("gate_up", "up", "down") for y in ("weight", "bias")),
    *(f"blk.0.ffn_{x}_shexp.weight" for x in ("gate", "up", "down", "gate_inp")),
    *("blk.0.attn_sinks.weight", "blk.0.exp_probs_b.bias", "blk.0.ffn_gate_inp.bias"),
    *("blk.0.layer_output_scale.weight", "blk.0.attn_qkv.weight", "blk.0.ffn_sub_norm.weight"),
    *("blk.0.ffn_norm.weight", "blk.0.post_ffw_norm.weight", "blk.99999.attn_norm.weight", ""),
)
_FLOATS = tuple(
    struct.pack("<f", x) for x in (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 1e30, 0, -1)
)


@dataclass(frozen=True)
class Stored:
    """A tensor. shape: rows first; type: its number in a file."""

    shape: tuple[int, ...]
    type: int
    data: bytes


@dataclass
class Model:
    """What a file holds. metadata: key -> value; other_keys: more that edge knows."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    other_keys: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, t: Tiny) -> Model:
        """A tiny model without a vocabulary."""
        tensors = {}
        for name, values in tiny.tensors(t).items():
            kind = "F32"
            if tiny.is_quantised(name, values):
                kind = t.type if isinstance(t.type, str) else t.type(name)
            data = tiny.quantise(values, kind).tobytes()
            tensors[name] = Stored(values.shape, TYPE_NUMBERS[kind] & 0xFFFF, data)
        module = importlib.import_module(f"edge.models.{t.arch.replace('-', '_')}")
        known = {*getattr(module, "KEYS", ()), *READ, *NEUTRAL, *EXPERTS, *SAME}
        others = tuple(sorted(tiny.whole_key(t, key) for key in known))
        return cls({"general.architecture": t.arch} | tiny.metadata(t), tensors, others)

    def copy(self) -> Model:
        """A model to change."""
        return Model(dict(self.metadata), dict(self.tensors), self.other_keys)

    @property
    def content(self) -> bytes:
        """The file."""
        keys = [_key(name, value) for name, value in self.metadata.items()]
        infos, data = [], bytearray()
        for name, tensor in self.tensors.items():
            dims = tuple(reversed(tensor.shape))
            infos.append(raw.tensor(name, dims, tensor.type, len(data)))
            data += tensor.data
            data += bytes(-len(data) % 32)
        return raw.gguf(keys, infos, bytes(data))


def _key(name: str, value: Any) -> bytes:
    """A metadata entry of the type that fits its value."""
    kind, value = _typed(value)
    return raw.key(name, kind, value)


def _typed(value: Any) -> tuple[int, Any]:
    """(type in the file, value as `ggufbytes` writes it)."""
    if isinstance(value, list):
        typed = [_typed(item) for item in value]
        kinds = {kind for kind, _ in typed}
        if len(kinds) < 2:
            return raw.ARRAY, (kinds.pop() if kinds else raw.U32, [item for _, item in typed])
        if kinds <= {raw.U32, raw.I64, raw.U64, raw.BOOL, raw.F64}:
            return raw.ARRAY, (raw.F64, [float(item) for item in value])
        return raw.ARRAY, (raw.STRING, [str(item) for item in value])
    if isinstance(value, bool):
        return raw.BOOL, value
    if isinstance(value, int):
        value = max(-(2**63), min(value, 2**64 - 1))
        wide = raw.U64 if value >= 0 else raw.I64
        return (raw.U32 if 0 <= value < 2**32 else wide), value
    return (raw.STRING if isinstance(value, str) else raw.F64), value


# ---- mutations -----------------------------------------------------------------------------------


def mutant(model: Model, rng: random.Random) -> Model:
    """A copy in which one or two things are wrong, or only unusual."""
    changed = model.copy()
    for _ in range(rng.choice((1, 1, 1, 2))):
        rng.choice(_MUTATIONS)(changed, rng)
    return changed


def _value(model: Model, rng: random.Random) -> None:
    """Another value of a key that is there, or is known."""
    if rng.random() < 0.3:
        key = rng.choice(model.other_keys)
    else:
        key = rng.choice([*model.metadata][1:] or model.other_keys)
    model.metadata[key] = _any_value(model.metadata.get(key), rng)


def _any_value(old: Any, rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((True, False))
    if kind == 1:
        return rng.choice(_STRINGS)
    if kind == 2:  # a list for layers
        n, item = rng.randrange(7), old if rng.random() < 0.5 and old is not None else 1
        items = [item[0] if isinstance(item, list) and item else item] * n
        if n and rng.random() < 0.5:
            items[rng.randrange(n)] = rng.choice((*NUMBERS, True, "1", [1]))
        return items
    if kind < 5 and isinstance(old, list) and old:
        at = rng.randrange(len(old))
        new = _any_value(old[at], rng)
        return rng.choice(([*old[:at], new, *old[at + 1 :]], old[:-1], [*old, old[0]]))
    if kind < 5 and isinstance(old, (int, float)):
        return rng.choice((old + 1, old - 1, old * 2, old // 2, -old, float(old), old * 1000))
    return rng.choice(NUMBERS)


def _no_key(model: Model, rng: random.Random) -> None:
    """A key is missing."""
    if len(model.metadata) > 1:
        del model.metadata[rng.choice([*model.metadata][1:])]


def _no_tensor(model: Model, rng: random.Random) -> None:
    """A tensor is missing, or all of a layer or of a kind are."""
    if not model.tensors:
        return
    name = rng.choice([*model.tensors])
    part = rng.choice((name, name, name.rpartition(".")[0], name[:6]))
    for other in [other for other in model.tensors if other.startswith(part)]:
        del model.tensors[other]


def _new_tensor(model: Model, rng: random.Random) -> None:
    """A tensor that an architecture may know, or a copy of another."""
    sizes = [n for tensor in model.tensors.values() for n in tensor.shape if n <= 4096]
    shape = tuple(rng.choice((*sizes, 1)) for _ in range(rng.choice((1, 1, 2, 3))))
    if math.prod(shape) > 1 << 16:
        shape = shape[-1:]
    new = Stored(shape, 0, rng.choice((b"\0\0\x80\x3f", *_FLOATS)) * math.prod(shape))
    if model.tensors and rng.random() < 0.3:
        new = model.tensors[rng.choice([*model.tensors])]
    model.tensors[rng.choice(_NAMES)] = new


def _shape(model: Model, rng: random.Random) -> None:
    """A tensor of another shape, with the bytes that it needs, or those that it had."""
    if not model.tensors:
        return
    name = rng.choice([*model.tensors])
    tensor = model.tensors[name]
    shape, at = list(tensor.shape), rng.randrange(len(tensor.shape))
    n = shape[at]
    shape[at] = rng.choice((n + 1, n - 1, 2 * n, n // 2, n + 16, n * 3, 1, 2**24 + 2, 2**63))
    shapes = (shape, shape, shape, [*tensor.shape[::-1]], [1, *tensor.shape], [*tensor.shape[1:]])
    _replace(model, name, tuple(rng.choice(shapes)), tensor.type, rng)


def _type(model: Model, rng: random.Random) -> None:
    """A tensor of another type."""
    if model.tensors:
        name = rng.choice([*model.tensors])
        kind = rng.choice((*TENSOR_TYPES, 99, 2**16 - 1)) & 0xFFFF
        _replace(model, name, model.tensors[name].shape, kind, rng)


def _replace(
    model: Model, name: str, shape: tuple[int, ...], kind: int, rng: random.Random
) -> None:
    """The tensor gets a shape and a type; its bytes are repeated or cut, but not always."""
    old, known = model.tensors[name], TENSOR_TYPES.get(kind)
    data = old.data
    if known is not None and rng.random() < 0.9:
        n_bytes = math.prod(shape) // known.block * known.block_bytes
        if n_bytes < 1 << 18:
            data = (data * (n_bytes // max(1, len(data)) + 1))[:n_bytes]
    model.tensors[name] = Stored(shape, kind, data)


def _data(model: Model, rng: random.Random) -> None:
    """Other numbers in a tensor: some floats, some bytes, or all bytes."""
    if not model.tensors:
        return
    name = rng.choice([*model.tensors])
    tensor = model.tensors[name]
    data, what = bytearray(tensor.data), rng.randrange(5)
    if what == 0:
        data = bytearray(rng.choice((b"\0", b"\xff", b"\x7f")) * len(data))
    elif what == 1:
        data = bytearray(rng.randbytes(len(data)))
    elif what == 2:
        data = bytearray(rng.choice(_FLOATS) * (len(data) // 4))
    for _ in range(rng.randrange(1, 5) if what > 2 and data else 0):
        at = rng.randrange(len(data)) & (-1 if what == 3 else -4)
        new = rng.randbytes(2) if what == 3 else rng.choice(_FLOATS)
        data[at : at + len(new)] = new
    model.tensors[name] = Stored(tensor.shape, tensor.type, bytes(data[: len(tensor.data)]))


_MUTATIONS = (
    _value,
    _value,
    _value,
    _value,
    _no_key,
    _no_tensor,
    _new_tensor,
    _shape,
    _type,
    _data,
    _data,
)


# ---- trying them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """What became of mutants: outcome -> how many; what went wrong with which mutant, or "";
    the most bytes of memory that their process had.
    """

    outcomes: Counter[str]
    fault: str
    most_bytes: int


def tried(numbers: Iterable[int], attempt: Callable[[int], str]) -> Tried:
    """attempt(number), in one forked child: what it said of each. A crash or a hang of the child is
    told with the number of the mutant.
    """
    with mmap.mmap(-1, 8) as at:
        source, target = os.pipe()
        child = os.fork()
        if child == 0:
            _child(numbers, attempt, at, target)
        os.close(target)
        with open(source, encoding="utf-8") as answer:
            said = answer.read()
        _, status, used = os.wait4(child, 0)
        code, number = os.waitstatus_to_exitcode(status), struct.unpack("<q", at[:])[0]
    most_bytes = used.ru_maxrss << 10
    if code == 0:
        return Tried(Counter(json.loads(said)), "", most_bytes)
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return Tried(Counter(), f"mutant {number}: {end} {said}", most_bytes)


def _child(
    numbers: Iterable[int], attempt: Callable[[int], str], at: mmap.mmap, target: int
) -> None:
    """Never returns."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, wherever that is
    outcomes, code = Counter[str](), 1
    try:
        for number in numbers:
            at[:] = struct.pack("<q", number)
            signal.alarm(SECONDS)
            outcomes[attempt(number)] += 1
        signal.alarm(0)
        said, code = json.dumps(outcomes), 0
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    with open(target, "w", encoding="utf-8") as answer:
        answer.write(said)
    os._exit(code)
