"""The two bindings are used alike: what edge does with `ffi` and `lib` gives the same with both."""

from __future__ import annotations

import ctypes
import gc
import mmap
from typing import Any

import numpy as np
import pytest

from edge._declarations import STRUCTS
from edge.binding import ctypes_ffi, library

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

#: What a wrong argument raises: ctypes wraps what cffi raises as it is.
WRONG = (OverflowError, TypeError, ctypes.ArgumentError)


@pytest.fixture(scope="module", params=library.BINDINGS)
def both(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(ffi, lib) of each binding."""
    if request.param == "cffi":
        pytest.importorskip("_cffi_backend")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_BINDING", request.param)
        return library.load()


@pytest.fixture
def ffi(both: tuple[Any, Any]) -> Any:
    return both[0]


@pytest.fixture
def lib(both: tuple[Any, Any]) -> Any:
    return both[1]


# ---- structs ---


def test_struct_by_names_in_order_and_as_a_copy(ffi: Any) -> None:
    named = ffi.new("edge_kv_shape *", {"type": 1, "head_dim": 64})
    in_order = ffi.new("edge_kv_shape *", [1, 0, 0, 64])
    copy = ffi.new("edge_kv_shape *", in_order[0])
    in_order.head_dim = 0
    for shape in (named, copy):
        assert (shape.type, shape.n_layers, shape.n_kv_heads, shape.head_dim) == (1, 0, 0, 64)


def test_struct_in_a_struct_is_copied(ffi: Any) -> None:
    shape, cache = ffi.new("edge_kv_shape *", [1, 2, 3, 64]), ffi.new("edge_kv_group *")
    cache.shape = shape[0]
    shape.n_layers = 9
    assert (cache.shape.n_layers, cache.shape.head_dim) == (2, 64)
    cache.shape.n_layers = 5
    assert cache.shape.n_layers == 5
    cache.shape = {"n_kv_heads": 4}
    assert cache.shape.n_kv_heads == 4
    assert ffi.new("edge_kv_group *", {"shape": {"type": 1}}).shape.type == 1


def test_array_of_structs(ffi: Any) -> None:
    buffers = ffi.new("edge_buffer[]", [(0, 8, 0, 64), (1, 16, 1, 128)])
    assert [(b.kind, b.dim, b.offset) for b in buffers] == [(0, 8, 64), (1, 16, 128)]
    ffi.addressof(buffers[1]).dim = 32
    assert len(buffers) == 2 and buffers[1].dim == 32
    with pytest.raises(IndexError):
        _ = buffers[2]


def test_array_in_a_struct(ffi: Any) -> None:
    op = ffi.new("edge_op *")
    op.w = [1, 2, 3]
    op.w[1] = -1
    setattr(op, "in", 7)
    assert list(op.w) == [1, -1, 3] and getattr(op, "in") == 7


@pytest.mark.parametrize("name, value", [("kind", 2**31), ("in2", -(2**31) - 1), ("out", 1 << 80)])
def test_number_that_a_field_cannot_hold(ffi: Any, name: str, value: int) -> None:
    op = ffi.new("edge_op *")
    with pytest.raises(OverflowError):
        setattr(op, name, value)


def test_wrong_field_or_type(ffi: Any) -> None:
    op = ffi.new("edge_op *")
    with pytest.raises(AttributeError):
        op.kinds = 1
    with pytest.raises(TypeError):
        op.kind = 1.5
    with pytest.raises(TypeError):
        op.kind = None


# ---- arrays and memory ---


def test_array_of_numbers(ffi: Any) -> None:
    ids = ffi.new("int32_t[]", [3, 4, 5])
    ids[0] = 9
    assert list(ids) == [9, 4, 5] and len(ffi.new("int64_t[]", 4)) == 4
    assert list(ffi.new("uint64_t[2]")) == [0, 0] and ffi.new("int32_t *")[0] == 0
    with pytest.raises(OverflowError):
        ffi.new("int32_t[]", [2**31])


def test_table_of_addresses(ffi: Any) -> None:
    page = ffi.from_buffer("uint8_t[]", bytearray(64))
    table, longer = ffi.new("void *[]", 2), ffi.new("void *[]", 4)
    table[1] = page + 8
    longer[0:2] = table[0:2]
    cache = ffi.new("edge_kv_group *", {"pages": longer})
    assert cache.pages[0] == ffi.NULL and cache.pages[2] == ffi.NULL
    addresses = [int(ffi.cast("uintptr_t", x)) for x in (cache.pages[1], page)]
    assert addresses[0] - addresses[1] == 8


@pytest.mark.parametrize("kind", [bytes, bytearray, np.uint8])
def test_memory_of_a_buffer(ffi: Any, kind: Any) -> None:
    data = np.arange(16, dtype=kind) if kind is np.uint8 else kind(range(16))
    with ffi.from_buffer("uint8_t[]", data) as memory:
        assert len(memory) == 16
        assert bytes(ffi.buffer(memory + 4, 3)) == bytes([4, 5, 6])
        target = bytearray(16)
        ffi.memmove(ffi.from_buffer("uint8_t[]", target), memory, 16)
    assert bytes(target) == bytes(data)


def test_buffer_stays_until_it_is_released(ffi: Any) -> None:
    block = mmap.mmap(-1, 4096)
    memory = ffi.from_buffer("uint8_t[]", block)
    with pytest.raises(BufferError):
        block.close()
    ffi.release(memory)
    block.close()
    with pytest.raises(ValueError):
        ffi.from_buffer("uint8_t[]", np.zeros((4, 4), np.uint8)[:, :2])


def test_buffer_is_the_memory_itself(ffi: Any) -> None:
    numbers = ffi.new("float[]", 3)
    view = memoryview(ffi.buffer(numbers))
    view[4:8] = np.float32(2.5).tobytes()
    assert (numbers[1], len(view)) == (2.5, 12)
    del numbers
    gc.collect()
    assert np.frombuffer(view, np.float32).tolist() == [0, 2.5, 0]


def test_structs_are_those_of_c() -> None:
    backend = pytest.importorskip("edge._cffi").ffi
    for name, fields in STRUCTS.items():
        if fields:
            assert ctypes_ffi.ffi.sizeof(name) == backend.sizeof(name)
            struct = type(ctypes_ffi.ffi.new(f"{name} *"))
            offsets = [getattr(struct, field).offset for field, _ in fields]
            assert offsets == [field.offset for _, field in backend.typeof(name).fields]


# ---- calls ---


def test_calls(ffi: Any, lib: Any) -> None:
    assert ffi.string(lib.edge_isa_name(0)) == b"scalar"
    assert lib.edge_isa_name(-1) == ffi.NULL
    weight, error = ffi.new("edge_weight *"), ffi.new("edge_error *")
    status = lib.edge_weight_describe(9999, 0, 1, 1, weight, error)
    assert status == error.code == lib.EDGE_BAD_ARGUMENT and b"9999" in ffi.string(error.text)


def test_numbers_by_address(ffi: Any, lib: Any) -> None:
    x, out = np.ones(4, np.float32), np.empty(4, np.float32)
    lib.edge_softmax(0, ffi.from_buffer("float[]", x), 4, ffi.cast("float *", out.ctypes.data))
    assert out.tolist() == [0.25] * 4


def test_threads_end_once(ffi: Any, lib: Any) -> None:
    made, ended = ffi.new("edge_threads **"), []
    assert made[0] == ffi.NULL
    assert lib.edge_threads_new(1, ffi.NULL, 0, made, ffi.NULL) == lib.EDGE_OK

    def end(threads: Any) -> None:
        ended.append(threads)
        lib.edge_threads_free(threads)

    threads = ffi.gc(made[0], end)
    sums = ffi.new("uint64_t[2]")
    assert lib.edge_checksum(threads, ffi.NULL, 0, sums) == lib.EDGE_OK
    ffi.release(threads)
    ffi.release(threads)
    del threads
    gc.collect()
    assert ended == [made[0]]
    threads = ffi.gc(made[0], ended.append)
    del threads
    gc.collect()
    assert len(ended) == 2


@pytest.mark.parametrize("wrong", [2**31, -(2**31) - 1, 1.5, "1", None])
def test_argument_of_the_wrong_kind(lib: Any, wrong: Any) -> None:
    with pytest.raises(WRONG):
        lib.edge_isa_usable(wrong)


def test_number_of_arguments_and_names(ffi: Any, lib: Any) -> None:
    with pytest.raises(TypeError):
        lib.edge_isa_usable()
    with pytest.raises((AttributeError, ffi.error)):
        _ = lib.edge_no_such_function
    with pytest.raises(WRONG):
        lib.edge_page_bytes(ffi.new("edge_op *"))
