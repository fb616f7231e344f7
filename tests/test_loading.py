"""The options of loading are plain values: they are those that the machinery below knows."""

from __future__ import annotations

import pytest

from edge.bench import runner
from edge.engine import predict
from edge.kv.shape import kv_types
from edge.loading import KV_TYPES, LAYOUTS
from edge.weights.packed import FORMS

pytestmark = pytest.mark.any_isa


def test_types_of_keys_and_values() -> None:
    assert [*KV_TYPES] == kv_types()
    assert [*KV_TYPES] == [*runner.GGML_TYPES] == [*predict.CACHE_SHARES]


def test_layouts() -> None:
    assert ("auto", *FORMS) == LAYOUTS
