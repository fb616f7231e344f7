"""Packing: every type comes back from its panels bit for bit, damage is found where it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refmath
from native_plan import (
    COMPACT_TYPES,
    FLOAT_TYPES,
    TYPE_NUMBERS,
    TYPES,
    Weight,
    described,
    floats,
    form_number,
    guarded,
    packed,
    shared_threads,
    unpacked,
)
from test_refmath import SIZES, n_halves, random_blocks, set_half

from edge import native
from edge.errors import NativeError
from edge.native import ffi, lib

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

CASES = [(t, "fast") for t in TYPES] + [(t, "compact") for t in COMPACT_TYPES]
ROWS = [1, 15, 16, 17, 33, 300]
ODD_SHAPES = [(1, 1), (15, 33), (17, 7), (48, 31)]  # for types without blocks


def shapes(type_name: str) -> list[tuple[int, int]]:
    """(n, k): all ROWS; one block, two, and odd numbers of them, of 32 at the least."""
    if type_name in FLOAT_TYPES:
        return [*shapes("Q8_0"), *ODD_SHAPES]
    block = SIZES[type_name].block
    return [(n, count * block) for n, count in zip(ROWS, (1, 1, 2, 3, 5, 2), strict=True)]


def test_every_referee_type_can_be_packed() -> None:
    assert sorted(TYPES) == sorted(refmath.TYPES)


def test_types_with_a_grid_have_a_compact_form() -> None:
    assert sorted(COMPACT_TYPES) == ["IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS"]
    for type_name in COMPACT_TYPES:
        fast, compact = (described(type_name, 32, 1024, form) for form in ("fast", "compact"))
        assert compact.entry.n_bytes < fast.entry.n_bytes
        disk = 32 * 4 * SIZES[type_name].block_bytes
        assert disk <= compact.entry.n_bytes < disk * 1.07


@pytest.mark.parametrize("type_name, form", CASES)
@pytest.mark.parametrize("threads", [1, 3])
def test_unpack_of_pack_is_the_reference(type_name: str, form: str, threads: int) -> None:
    for n, k in shapes(type_name):
        raw = random_blocks(type_name, n * k // SIZES[type_name].block, seed=n + k)
        weight = packed(type_name, raw, (n, k), threads, form)
        want = refmath.dequantise(type_name, raw, (n, k)).view(np.uint32)
        np.testing.assert_array_equal(unpacked(weight).view(np.uint32), want)
        row = n // 2
        np.testing.assert_array_equal(unpacked(weight, row, 1).view(np.uint32), want[row : row + 1])


@pytest.mark.parametrize("type_name, form", CASES)
def test_panels_fill_their_bytes_and_pad_with_zeros(type_name: str, form: str) -> None:
    """Kernels read whole panels: rows and groups that are not there must be zero."""
    block = SIZES[type_name].block
    for n, k in [(17, 3 * max(block, 32)), (16, 2 * max(block, 32)), (32, max(block, 32))]:
        weight = described(type_name, n, k, form)
        weight.memory[:] = 0xFF
        raw = random_blocks(type_name, n * k // block)
        assert pack_into(weight, type_name, raw) == lib.EDGE_OK
        again = packed(type_name, raw, (n, k), form=form)  # into zeros
        np.testing.assert_array_equal(weight.memory, again.memory)


@pytest.mark.parametrize("type_name, form", CASES)
def test_rows_that_are_not_there_are_zero(type_name: str, form: str) -> None:
    k = 3 * max(SIZES[type_name].block, 32)
    raw = random_blocks(type_name, k // SIZES[type_name].block)
    weight = packed(type_name, raw, (1, k), form=form)
    weight.entry.n = 16  # all of the panel
    values = unpacked(weight)
    np.testing.assert_array_equal(values[:1], refmath.dequantise(type_name, raw, (1, k)))
    assert not values[1:].any()


def pack_into(weight: Weight, type_name: str, raw: np.ndarray, error: Any = ffi.NULL) -> int:
    """The status of edge_weight_pack on three threads."""
    source = ffi.from_buffer("uint8_t[]", np.ascontiguousarray(raw))
    number = TYPE_NUMBERS[type_name]
    return lib.edge_weight_pack(shared_threads(3), number, weight.entry, source, raw.nbytes, error)


def damage(type_name: str, blocks: np.ndarray, i: int, value: str) -> None:
    """Make the i-th float of blocks (block_bytes,) NaN or infinite."""
    if type_name == "F32":
        blocks[:] = np.array([value], "<f4").view(np.uint8)
    elif type_name == "BF16":
        blocks[:] = [0xC0 if value == "nan" else 0x80, 0x7F]
    else:
        set_half(type_name, blocks, i, np.array(value, "<f2").view("<u2"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("type_name, form", [case for case in CASES if not case[0].endswith("FP4")])
def test_damage_is_reported_where_it_is(type_name: str, form: str, value: str) -> None:
    n, row, block = 40, 35, SIZES[type_name].block
    k = 3 * max(block, 32)
    column = k * 2 // 3
    for i in range(max(1, n_halves(type_name))):  # scale, minimum
        raw = random_blocks(type_name, n * k // block).reshape(n, k // block, -1)
        for r in (row, row + 3):  # the first counts
            damage(type_name, raw[r, column // block], i, value)
        error = ffi.new("edge_error *")
        status = pack_into(described(type_name, n, k, form), type_name, raw, error)
        assert status == error.code == lib.EDGE_BAD_DATA
        assert (error.row, error.column, error.op) == (row, column, -1)
        assert f"row {row}, column {column}" in native.text(error.text)


@pytest.mark.parametrize(
    "type_number, n, k",
    [
        *((TYPE_NUMBERS["Q4_0"], n, k) for n, k in [(0, 32), (1, 0), (1, 33), (-1, 32), (1, -32)]),
        *((TYPE_NUMBERS["Q2_0"], 1, k) for k in (32, 96)),
        *((TYPE_NUMBERS["Q1_0"], 1, k) for k in (64, 192)),
        *((TYPE_NUMBERS["F32"], n, k) for n, k in [(2**31, 1), (1, 2**31), (2**62, 2**62)]),
        *((TYPE_NUMBERS[name], 1, k) for name in ("Q4_K", "IQ3_S") for k in (32, 255, 384)),
        *((number, 1, 256) for number in (-1, 4, 5, 9, 15, 24, 28, 43, 1000)),
    ],
)
def test_describe_refuses(type_number: int, n: int, k: int) -> None:
    weight, error = ffi.new("edge_weight *"), ffi.new("edge_error *")
    for form in ("fast", "compact"):
        given = (type_number, form_number(form), n, k)
        status = lib.edge_weight_describe(*given, weight, error)
        assert status == error.code == lib.EDGE_BAD_ARGUMENT
        assert native.text(error.text)
        assert lib.edge_weight_describe(*given, weight, ffi.NULL) == status


@pytest.mark.parametrize("form", [-1, 2, 2**31 - 1])
def test_describe_refuses_forms_that_are_none(form: int) -> None:
    weight = ffi.new("edge_weight *")
    number = TYPE_NUMBERS["IQ3_S"]
    status = lib.edge_weight_describe(number, form, 16, 256, weight, ffi.NULL)
    assert status == lib.EDGE_BAD_ARGUMENT


def test_describe_refuses_null() -> None:
    status = lib.edge_weight_describe(TYPE_NUMBERS["F32"], 0, 1, 1, ffi.NULL, ffi.NULL)
    assert status == lib.EDGE_BAD_ARGUMENT


@pytest.mark.parametrize(
    "wrong", ["threads", "weight", "src", "data", "type", "size", "n_bytes", "n"]
)
def test_pack_refuses(wrong: str) -> None:
    raw, weight = random_blocks("Q4_0", 16), described("Q4_0", 16, 32)
    given = {
        "threads": shared_threads(),
        "weight": weight.entry,
        "src": ffi.from_buffer("uint8_t[]", raw),
    }
    type_name, size = "Q4_0", raw.nbytes
    if wrong in given:
        given[wrong] = ffi.NULL
    elif wrong == "data":
        weight.entry.data = ffi.NULL
    elif wrong == "type":
        type_name = "Q8_0"
    elif wrong == "size":
        size -= 1
    else:
        setattr(weight.entry, wrong, getattr(weight.entry, wrong) + 64)
    number = TYPE_NUMBERS[type_name]
    status = lib.edge_weight_pack(
        given["threads"], number, *list(given.values())[1:], size, ffi.NULL
    )
    assert status == lib.EDGE_BAD_ARGUMENT


@pytest.mark.parametrize("row, n_rows", [(-1, 1), (0, 18), (17, 1), (0, -1), (2**62, 2**62)])
def test_unpack_refuses_rows_outside(row: int, n_rows: int) -> None:
    weight = packed("Q8_0", random_blocks("Q8_0", 17), (17, 32))
    out = np.empty((32, 32), np.float32)
    status = lib.edge_weight_unpack(weight.entry, row, n_rows, floats(out))
    assert status == lib.EDGE_BAD_ARGUMENT


def test_unpack_refuses_null() -> None:
    weight = packed("Q8_0", random_blocks("Q8_0", 1), (1, 32))
    out = np.empty(32, np.float32)
    assert lib.edge_weight_unpack(ffi.NULL, 0, 1, floats(out)) == lib.EDGE_BAD_ARGUMENT
    assert lib.edge_weight_unpack(weight.entry, 0, 1, ffi.NULL) == lib.EDGE_BAD_ARGUMENT
    weight.entry.data = ffi.NULL
    assert lib.edge_weight_unpack(weight.entry, 0, 1, floats(out)) == lib.EDGE_BAD_ARGUMENT


def codes_of(weight: Weight, row: int, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows as integers, by the library: codes (n_rows, k), scales, mins (n_rows, k / group)."""
    k, group = weight.shape[1], lib.edge_layout_group(weight.entry.layout)
    codes = guarded(n_rows * k, align=1).view(np.int8)
    pair = [guarded(n_rows * k // group * 4, align=4).view(np.float32) for _ in range(2)]
    status = lib.edge_weight_codes(
        weight.entry, row, n_rows, ffi.cast("int8_t *", codes.ctypes.data), *map(floats, pair)
    )
    native.check(status)
    return codes.reshape(n_rows, k), *(x.reshape(n_rows, k // group) for x in pair)


def values_of(weight: Weight) -> tuple[list[int], bool]:
    """What a weight's codes can stand for, and whether it has minima."""
    values, has_min = ffi.new("int8_t[256]"), ffi.new("int32_t *")
    n = lib.edge_weight_values(weight.entry, values, has_min)
    return [values[i] for i in range(n)], bool(has_min[0])


@pytest.mark.parametrize("type_name, form", [c for c in CASES if c[0] not in FLOAT_TYPES])
def test_codes_are_what_unpack_multiplies(type_name: str, form: str) -> None:
    for n, k in shapes(type_name):
        raw = random_blocks(type_name, n * k // SIZES[type_name].block, seed=n + k)
        weight = packed(type_name, raw, (n, k), form=form)
        values, has_min = values_of(weight)
        for row, n_rows in ((0, n), (n // 2, n - n // 2), (n - 1, 1)):
            codes, scales, mins = codes_of(weight, row, n_rows)
            group = lib.edge_layout_group(weight.entry.layout)
            product = np.repeat(scales, group, 1) * codes.astype(np.float32)
            got = product + np.repeat(mins, group, 1)
            want = unpacked(weight, row, n_rows)
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
            assert set(codes.ravel().tolist()) <= set(values)
            assert has_min or (mins.view(np.uint32) == 1 << 31).all()


@pytest.mark.parametrize("type_name, form", [c for c in CASES if c[0] not in FLOAT_TYPES])
def test_every_value_occurs(type_name: str, form: str) -> None:
    k = 8 * max(SIZES[type_name].block, 32)
    weight = packed(type_name, random_blocks(type_name, 33 * 8), (33, k), form=form)
    want = set(values_of(weight)[0])
    if type_name == "TQ1_0":  # whose layout TQ2_0 has, too
        want -= {2}
    assert set(codes_of(weight, 0, 33)[0].ravel().tolist()) == want


@pytest.mark.parametrize("type_name", FLOAT_TYPES)
def test_floats_have_no_codes(type_name: str) -> None:
    weight = described(type_name, 16, 32)
    assert lib.edge_layout_group(weight.entry.layout) == 0
    assert values_of(weight) == ([], False)
    out = floats(np.empty((16, 32), np.float32))
    codes = ffi.cast("int8_t *", out)
    assert lib.edge_weight_codes(weight.entry, 0, 1, codes, out, out) == lib.EDGE_BAD_ARGUMENT


@pytest.mark.parametrize("layout", [-2, -1, lib.EDGE_N_LAYOUTS, 2**31 - 1])
def test_layouts_that_are_none_have_no_groups(layout: int) -> None:
    assert lib.edge_layout_group(layout) == 0
    weight = described("Q8_0", 16, 32)
    weight.entry.layout = layout
    assert values_of(weight) == ([], False)


@pytest.mark.parametrize("wrong", ["weight", "codes", "scales", "mins", "data", "row", "n_rows"])
def test_codes_refuse(wrong: str) -> None:
    weight, out = packed("Q8_0", random_blocks("Q8_0", 17), (17, 32)), np.empty(999, np.float32)
    given = {"weight": weight.entry, "row": 0, "n_rows": 17}
    given |= {"codes": ffi.cast("int8_t *", out.ctypes.data), "scales": floats(out)}
    given["mins"] = floats(out)
    if wrong == "data":
        weight.entry.data = ffi.NULL
    else:
        given[wrong] = {"row": 1, "n_rows": -1}.get(wrong, ffi.NULL)
    assert lib.edge_weight_codes(*given.values()) == lib.EDGE_BAD_ARGUMENT


def test_values_refuse_null() -> None:
    entry = described("Q8_0", 1, 32).entry
    values, has_min = ffi.new("int8_t[256]"), ffi.new("int32_t *")
    assert lib.edge_weight_values(ffi.NULL, values, has_min) == 0
    assert lib.edge_weight_values(entry, ffi.NULL, has_min) == 0
    assert lib.edge_weight_values(entry, values, ffi.NULL) == 0
    entry.table = lib.EDGE_N_TABLES
    assert lib.edge_weight_values(entry, values, has_min) == 0


def test_layout_names_are_those_of_the_header() -> None:
    names = [lib.edge_layout_name(i) for i in range(-1, lib.EDGE_N_LAYOUTS + 1)]
    assert names[0] == names[-1] == ffi.NULL
    for i, name in enumerate(names[1:-1]):
        assert getattr(lib, f"EDGE_LAYOUT_{native.text(name).upper()}") == i


@pytest.mark.parametrize("type_name, form", CASES)
def test_layouts_of_codes_take_quantised_activations(type_name: str, form: str) -> None:
    entry = described(type_name, 16, 256, form).entry
    assert lib.edge_layout_takes_q8(entry.layout) == (type_name not in FLOAT_TYPES)


@pytest.mark.parametrize("layout", [-2, -1, lib.EDGE_N_LAYOUTS, 2**31 - 1])
def test_layouts_that_are_none_take_nothing(layout: int) -> None:
    assert not lib.edge_layout_takes_q8(layout)


def test_grids_are_what_their_generator_writes() -> None:
    folder = Path(__file__).parents[1] / "native" / "formats"
    command = [sys.executable, folder / "generate_grids.py"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert text == (folder / "grids.c").read_text(encoding="utf-8")


def test_bad_weight_is_a_native_error() -> None:
    raw = random_blocks("F32", 32)
    raw[3] = np.frombuffer(np.float32("nan").tobytes(), np.uint8)
    with pytest.raises(NativeError, match="row 0, column 3"):
        packed("F32", raw, (1, 32))
