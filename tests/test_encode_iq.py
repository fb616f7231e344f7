"""Encoders of the IQ types where libgguf is no reference."""

from __future__ import annotations

import numpy as np
import pytest
from native_plan import shared_threads

from edge.quantizer.encode import Encoder, decode

pytestmark = [pytest.mark.native, pytest.mark.any_isa]


def test_group_of_zeros_leaves_the_others_in_place() -> None:
    """libgguf writes those after it one place too early."""
    x = np.random.default_rng(0).normal(size=(1, 256)).astype(np.float32)
    x[:, 64:96] = 0
    threads = shared_threads()
    got = decode("IQ3_S", Encoder("IQ3_S").encode(x, None, threads), 256, threads)
    assert ((got - x) ** 2).sum() < 0.1 * (x**2).sum()
