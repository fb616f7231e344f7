"""The sampler: what each option does, and that a seed means the same everywhere."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import native
from edge.errors import InputError
from edge.sampler import (
    Sampler,
    SamplingOptions,
    largest,
    philox4x32,
    sampling_fields,
    uniform,
)

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def draws(values: np.ndarray, n: int = 400, history: tuple[int, ...] = (), **options) -> list[int]:
    sampler = Sampler(SamplingOptions(**{**PLAIN, **options}))
    return [sampler.sample(values, history) for _ in range(n)]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that come with Random123
        (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**128 - 1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x0370734413198A2E85A308D3243F6A88,
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_known_answers(counter, key, words):
    assert " ".join(f"{w:08x}" for w in philox4x32(counter, key)) == words


def test_uniform_is_below_one_and_even():
    values = [uniform(7, i) for i in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert np.histogram(values, 10, (0, 1))[0].min() > 150


def test_seed_means_the_same_everywhere():
    values = np.arange(64, dtype=np.float32) / 16
    assert draws(values, 8, seed=3) == [60, 43, 59, 34, 62, 54, 61, 62]
    cut = {"top_k": 20, "top_p": 0.9, "temperature": 0.7}
    assert draws(values, 8, seed=3, **cut) == [53, 61, 54, 62, 50, 58, 52, 50]


def test_counter_is_the_whole_state():
    values = np.linspace(0, 2, 100, dtype=np.float32)
    all_of_them = draws(values, 10)
    sampler = Sampler(SamplingOptions(**PLAIN))
    sampler.draws = 6
    assert [sampler.sample(values, ()) for _ in range(4)] == all_of_them[6:]


def test_temperature_zero_takes_the_first_of_the_best():
    assert draws(logits(1, 5, 5, 2), 3, temperature=0) == [1, 1, 1]


def test_draws_follow_the_probabilities():
    values = logits(0, 1, 2)
    share = np.bincount(draws(values, 6000), minlength=3) / 6000
    assert np.abs(share - native.softmax(values)).max() < 0.02


@pytest.mark.parametrize("temperature", [1e-320, 1e-9, 100.0])
def test_extreme_temperatures_are_harmless(temperature):
    got = set(draws(logits(-3e38, 1, 2, 3e38), 50, temperature=temperature))
    assert got == {3}


def test_top_k_keeps_the_k_best_lowest_id_first():
    assert set(draws(logits(1, 1, 1, 2, 0), top_k=3)) == {0, 1, 3}


def test_top_p_keeps_the_fewest_that_reach_it():
    values = np.log(logits(0.5, 0.3, 0.15, 0.05))
    assert set(draws(values, top_p=0.49)) == {0}
    assert set(draws(values, top_p=0.51)) == {0, 1}
    assert set(draws(values, top_p=0.9)) == {0, 1, 2}


def test_top_p_looks_beyond_its_first_hundreds():
    values = np.zeros(20_000, np.float32)
    assert max(draws(values, top_p=0.9)) < 18_001
    assert max(draws(values, top_p=0.9)) > 9_000


def test_min_p_is_a_share_of_the_best():
    values = np.log(logits(0.5, 0.3, 0.15, 0.05))
    assert set(draws(values, min_p=0.2)) == {0, 1, 2}
    assert set(draws(values, min_p=1.0)) == {0}


def test_min_p_and_top_p_keep_what_both_keep():
    values = np.log(logits(0.5, 0.3, 0.15, 0.05))
    assert set(draws(values, min_p=0.2, top_p=0.7)) == {0, 1}
    assert set(draws(values, min_p=0.5, top_p=0.9)) == {0, 1}
    assert set(draws(values, min_p=0.2, top_p=0.96)) == {0, 1, 2}


def test_repetition_penalty_divides_or_multiplies():
    values = logits(2, 1.5, -1, -1.5)
    assert draws(values, 1, (0,), temperature=0, repetition_penalty=2.0) == [1]
    assert draws(values[2:], 1, (0,), temperature=0, repetition_penalty=2.0) == [1]


def test_presence_counts_once_and_frequency_each_time():
    values, seen = logits(3, 2), (0, 0, 0)
    assert draws(values, 1, seen, temperature=0, presence_penalty=0.9) == [0]
    assert draws(values, 1, seen, temperature=0, frequency_penalty=0.4) == [1]


@pytest.mark.parametrize(("window", "best"), [(2, 0), (3, 1), (-1, 1), (0, 0), (99, 1)])
def test_penalties_look_back_over_their_window(window, best):
    options = {"temperature": 0, "presence_penalty": 5.0, "penalty_window": window}
    assert draws(logits(3, 2, 1), 1, (0, 2, 2), **options) == [best]


def test_logit_bias_adds_and_forbids():
    values = logits(3, 2, 1)
    assert draws(values, 1, temperature=0, logit_bias={2: 2.5}) == [2]
    assert set(draws(values, logit_bias={0: -math.inf}, temperature=100.0)) == {1, 2}


def test_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(InputError, match="names token 9, the vocabulary has 3"):
        draws(logits(1, 2, 3), 1, logit_bias={9: 1.0})


def test_logits_are_left_alone():
    values = logits(3, 2, 1)
    draws(values, 5, (0, 1), repetition_penalty=1.3, logit_bias={1: 1.0})
    assert values.tolist() == [3, 2, 1]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 45))
def test_largest_sorts_by_value_then_index(values, k):
    want = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert largest(np.array(values, np.float32), k).tolist() == want


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 101.0),
        ("penalty_window", -2),
        ("seed", -1),
        ("seed", 2**64),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"a": 0.0}),
        ("logit_bias", {1: None}),
        ("logit_bias", [1]),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(InputError, match=name):
        SamplingOptions(**{name: value})


def test_every_field_explains_itself():
    assert [o.name for o in sampling_fields()] == [f.name for f in fields(SamplingOptions)]
    for option in sampling_fields():
        assert option.help.endswith(".")
        assert option.kind is dict or option.min <= option.default <= option.max


def test_a_draw_from_a_large_vocabulary_is_cheap(benchmark):
    values = np.random.default_rng(0).standard_normal(200_064).astype(np.float32)
    sampler, history = Sampler(SamplingOptions(repetition_penalty=1.1)), list(range(500))
    benchmark(sampler.sample, values, history)
