"""The sampler: what each option does, and that a seed means the same everywhere."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import native
from edge.errors import InputError
from edge.session import sampler
from edge.session.sampler import (
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
    drawn = Sampler(SamplingOptions(**{**PLAIN, **options}))
    return [drawn.sample(values, history) for _ in range(n)]


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
    assert draws(values, 8, seed=3, **cut) == [52, 61, 53, 62, 49, 57, 51, 49]


def test_counter_is_the_whole_state():
    values = np.linspace(0, 2, 100, dtype=np.float32)
    all_of_them = draws(values, 10)
    late = Sampler(SamplingOptions(**PLAIN))
    late.draws = 6
    assert [late.sample(values, ()) for _ in range(4)] == all_of_them[6:]


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_that_forbids_all_tokens_is_refused(temperature):
    forbidden = dict.fromkeys(range(3), -math.inf)
    with pytest.raises(InputError, match="forbids all 3 tokens"):
        draws(logits(1, 2, 3), 1, temperature=temperature, logit_bias=forbidden)
    assert draws(logits(1, 2, 3), 1, temperature=temperature, logit_bias=forbidden | {0: 0.0}) == [
        0
    ]


@pytest.mark.parametrize("options", [{}, {"presence_penalty": -100.0}, {"top_k": 3}])
def test_what_is_forbidden_stays_so(options):
    values, everything = logits(-3e38, 1, 2, 3), (0, 1, 2, 3)
    only = {1: -math.inf, 2: -math.inf, 3: -math.inf}
    assert set(draws(values, 20, everything, logit_bias=only, **options)) == {0}


# ---- the order, and that equal options mean llama.cpp's distributions ----


def restated(values: np.ndarray, history: tuple[int, ...], o: SamplingOptions) -> np.ndarray:
    """Probabilities by the documentation of llama.cpp's samplers, token by token in float64."""
    x = [float(value) + o.logit_bias.get(i, 0.0) for i, value in enumerate(values)]
    window = history
    if o.penalty_window >= 0:
        window = history[max(0, len(history) - o.penalty_window) :]
    for i in set(window):
        x[i] = x[i] * o.repetition_penalty if x[i] <= 0 else x[i] / o.repetition_penalty
        x[i] -= window.count(i) * o.frequency_penalty + o.presence_penalty

    def softmax(ids: list[int], temperature: float) -> dict[int, float]:
        top = max(x[i] for i in ids)
        e = {i: math.exp((x[i] - top) / temperature) for i in ids}
        return {i: e[i] / math.fsum(e.values()) for i in ids}

    left = sorted(range(len(x)), key=lambda i: (-x[i], i))  # top-k
    left = left[: o.top_k or None]
    p, reached, kept = softmax(left, 1.0), 0.0, []  # top-p: until the sum reaches it
    for i in left if o.top_p < 1 else ():
        kept.append(i)
        reached += p[i]
        if reached >= o.top_p:
            break
    left = kept or left
    if o.min_p > 0:  # min-p: by logits
        left = [i for i in left if x[i] >= x[left[0]] + math.log(o.min_p)]
    if o.temperature == 0:
        left = left[:1]
    result = np.zeros(len(x))
    for i, probability in softmax(left, o.temperature or 1.0).items():
        result[i] = probability
    return result


def distribution(values: np.ndarray, history: tuple[int, ...], o: SamplingOptions) -> np.ndarray:
    """What the sampler draws from."""
    result = np.zeros(len(values))
    if o.temperature == 0:
        result[Sampler(o).sample(values, history)] = 1
        return result
    adjusted = values.copy()
    for adjust in sampler.ADJUST:
        adjust(adjusted, sampler._seen(history, o), o)
    ids = sampler._cut(adjusted, o)
    p = sampler._softmax(adjusted[ids], o.temperature).astype(np.float64)
    result[ids] = p / p.sum()
    drawn = {Sampler(o).sample(values, history)}
    assert drawn <= set(ids.tolist())
    return result


SOME_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 17, 99]),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.1, 0.5]),
        "repetition_penalty": st.sampled_from([0.8, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.3]),
        "penalty_window": st.sampled_from([-1, 0, 3, 64]),
        "logit_bias": st.sampled_from([{}, {1: 3.5, 2: -math.inf}]),
    },
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(SOME_OPTIONS, st.integers(0, 2**32), st.lists(st.integers(0, 39), max_size=12))
def test_equal_options_mean_the_distributions_of_llama_cpp(options, seed, history):
    values = (np.random.default_rng(seed).standard_normal(40) * 3).astype(np.float32)
    o = SamplingOptions(**options).settled()
    want, got = restated(values, tuple(history), o), distribution(values, tuple(history), o)
    assert np.abs(got - want).max() < 1e-5


def test_top_p_and_min_p_come_before_the_temperature():
    values = np.log(logits(0.5, 0.3, 0.15, 0.05))
    for temperature in (0.1, 1.0, 100.0):
        assert set(draws(values, 4000, temperature=temperature, top_p=0.81)) <= {0, 1, 2}
        assert set(draws(values, 4000, temperature=temperature, min_p=0.2)) <= {0, 1, 2}
    assert set(draws(values, temperature=100.0, top_p=0.81)) == {0, 1, 2}


def test_the_bias_comes_before_the_penalties():
    bias = {"temperature": 0, "logit_bias": {0: 4.0}, "repetition_penalty": 2.0}
    assert draws(logits(-1, 2), 1, (0,), **bias) == [1]  # (-1 + 4) / 2; after them: -1 * 2 + 4
    assert draws(logits(-1, 1), 1, (0,), **bias) == [0]


# ---- seeds ----


@pytest.mark.parametrize("seed", [None, -1, np.int64(-1)])
def test_a_random_seed_is_settled_once(seed):
    options = SamplingOptions(seed=seed)
    assert options.seed is None and options == SamplingOptions(seed=None)
    seeds = {options.settled().seed for _ in range(20)}
    assert len(seeds) > 10 and all(0 <= seed < 2**32 for seed in seeds)
    settled = options.settled()
    assert settled.settled() is settled
    assert Sampler(options).options.seed is not None


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
        ("seed", -2),
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
    one, history = Sampler(SamplingOptions(repetition_penalty=1.1)), list(range(500))
    benchmark(one.sample, values, history)
