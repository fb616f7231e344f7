"""Packing: every type comes back from its panels bit for bit, damage is found where it is."""

from __future__ import annotations

import numpy as np
import pytest
import refmath
from native_plan import (
    FLOAT_TYPES,
    TYPE_NUMBERS,
    TYPES,
    described,
    floats,
    packed,
    pool,
    unpacked,
)
from test_refmath import SIZES, random_blocks

from edge import native
from edge.errors import NativeError
from edge.native import ffi, lib

pytestmark = pytest.mark.native

SHAPES = [(1, 32), (15, 32), (16, 64), (17, 96), (33, 160), (300, 64)]
ODD_SHAPES = [(1, 1), (15, 33), (17, 7), (48, 31)]  # for types without blocks


def test_every_referee_type_can_be_packed() -> None:
    assert sorted(TYPES) == sorted(refmath.TYPES)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_unpack_of_pack_is_the_reference(type_name: str, threads: int) -> None:
    for n, k in [*SHAPES, *(ODD_SHAPES if type_name in FLOAT_TYPES else ())]:
        raw = random_blocks(type_name, n * k // SIZES[type_name].block, seed=n + k)
        weight = packed(type_name, raw, (n, k), threads)
        want = refmath.dequantise(type_name, raw, (n, k)).view(np.uint32)
        np.testing.assert_array_equal(unpacked(weight).view(np.uint32), want)
        row = n // 2
        np.testing.assert_array_equal(unpacked(weight, row, 1).view(np.uint32), want[row : row + 1])


@pytest.mark.parametrize("type_name", TYPES)
def test_panels_fill_their_bytes_and_pad_with_zeros(type_name: str) -> None:
    """Kernels read whole panels: rows and groups that are not there must be zero."""
    n, k = 17, 96
    weight = described(type_name, n, k)
    weight.memory[:] = 0xFF
    raw = random_blocks(type_name, n * k // SIZES[type_name].block)
    status = lib.edge_weight_pack(
        pool(),
        TYPE_NUMBERS[type_name],
        weight.entry,
        ffi.from_buffer("uint8_t[]", raw),
        raw.nbytes,
        ffi.NULL,
    )
    assert status == lib.EDGE_OK
    again = packed(type_name, raw, (n, k))  # into zeros
    np.testing.assert_array_equal(weight.memory, again.memory)


def float_bytes(type_name: str, value: str) -> list[int]:
    """The bytes of NaN or infinity, as the first or second float of a block."""
    if type_name == "F32":
        return list(np.array([value], "<f4").view(np.uint8))
    if type_name == "BF16":
        return [0xC0 if value == "nan" else 0x80, 0x7F]
    return list(np.array([value], "<f2").view(np.uint8))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("type_name", TYPES)
def test_damage_is_reported_where_it_is(type_name: str, value: str) -> None:
    n, k, row, block = 40, 96, 35, SIZES[type_name].block
    column = 64 // block * block
    for at in (0, 2) if type_name == "Q4_1" else (0,):  # scale, minimum
        raw = random_blocks(type_name, n * k // block).reshape(n, k // block, -1)
        bad = float_bytes(type_name, value)
        for r in (row, row + 3):  # the first counts
            raw[r, column // block, at : at + len(bad)] = bad
        weight, error = described(type_name, n, k), ffi.new("edge_error *")
        status = lib.edge_weight_pack(
            pool(3),
            TYPE_NUMBERS[type_name],
            weight.entry,
            ffi.from_buffer("uint8_t[]", raw),
            raw.nbytes,
            error,
        )
        assert status == error.code == lib.EDGE_BAD_DATA
        assert (error.row, error.column, error.op) == (row, column, -1)
        assert f"row {row}, column {column}" in native.text(error.text)


@pytest.mark.parametrize(
    "type_number, n, k",
    [
        *((TYPE_NUMBERS["Q4_0"], n, k) for n, k in [(0, 32), (1, 0), (1, 33), (-1, 32), (1, -32)]),
        *((TYPE_NUMBERS["F32"], n, k) for n, k in [(2**31, 1), (1, 2**31), (2**62, 2**62)]),
        *((number, 1, 256) for number in (-1, 4, 5, 12, 1000)),
    ],
)
def test_describe_refuses(type_number: int, n: int, k: int) -> None:
    weight, error = ffi.new("edge_weight *"), ffi.new("edge_error *")
    status = lib.edge_weight_describe(type_number, n, k, weight, error)
    assert status == error.code == lib.EDGE_BAD_ARGUMENT
    assert native.text(error.text)
    assert lib.edge_weight_describe(type_number, n, k, weight, ffi.NULL) == status
    assert lib.edge_weight_describe(TYPE_NUMBERS["F32"], 1, 1, ffi.NULL, ffi.NULL) == status


@pytest.mark.parametrize("wrong", ["pool", "weight", "src", "data", "type", "size", "n_bytes", "n"])
def test_pack_refuses(wrong: str) -> None:
    raw, weight = random_blocks("Q4_0", 16), described("Q4_0", 16, 32)
    given = {"pool": pool(), "weight": weight.entry, "src": ffi.from_buffer("uint8_t[]", raw)}
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
    status = lib.edge_weight_pack(given["pool"], number, *list(given.values())[1:], size, ffi.NULL)
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


def test_layout_names_end() -> None:
    names = [lib.edge_layout_name(i) for i in range(-1, lib.EDGE_N_LAYOUTS + 1)]
    assert names[0] == names[-1] == ffi.NULL
    assert [native.text(name) for name in names[1:-1]] == [
        "f32",
        "f16",
        "bf16",
        "c4h32",
        "c4mh32",
        "c8h32",
    ]


@pytest.mark.parametrize("type_name", TYPES)
def test_layouts_of_codes_take_quantised_activations(type_name: str) -> None:
    entry = described(type_name, 16, 32).entry
    assert lib.edge_layout_takes_q8(entry.layout) == (type_name not in FLOAT_TYPES)


@pytest.mark.parametrize("layout", [-2, -1, 6, 2**31 - 1])
def test_layouts_that_are_none_take_nothing(layout: int) -> None:
    assert not lib.edge_layout_takes_q8(layout)


def test_bad_weight_is_a_native_error() -> None:
    raw = random_blocks("F32", 32)
    raw[3] = np.frombuffer(np.float32("nan").tobytes(), np.uint8)
    with pytest.raises(NativeError, match="row 0, column 3"):
        packed("F32", raw, (1, 32))
