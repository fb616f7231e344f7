"""Rounding with error feedback: better than to the nearest, and the rule that it claims to be."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from native_plan import shared_threads
from numpy.typing import NDArray
from refmath import IQ4_NL_VALUES

from edge.errors import InputError
from edge.quantizer.encode import ENCODED_TYPES, IMPORTANCE_TYPES, Encoder, decode
from edge.quantizer.feedback import DAMPING, FeedbackRounder, Rounded
from edge.quantizer.moments import Moments, RowMoments

pytestmark = pytest.mark.native

encoder = functools.cache(Encoder)

#: Of 1 to 6 bits.
TYPES = [t for t in ENCODED_TYPES if t not in ("F32", "F16", "BF16", "Q8_0")]
K = 256
#: What is left of the error at most, where that is not 0.75: one bit leaves little choice.
MARGINS = {"Q1_0": 0.85}


@functools.cache
def inputs(n_tokens: int, k: int = K, seed: int = 0) -> NDArray[np.float32]:
    """Columns of different sizes that depend on each other. seed: of the tokens alone."""
    mix = np.random.default_rng(1).standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    sizes = np.exp(np.random.default_rng(2).standard_normal(k) / 2)
    x = np.random.default_rng(seed).standard_normal((n_tokens, k))
    return (x @ (mix * sizes)).astype(np.float32)


def moments_of(train: NDArray[np.float32], held: NDArray[np.float32] | None = None) -> Moments:
    held = inputs(1024, train.shape[1], seed=9) if held is None else held
    return Moments(train.T @ train, held.T @ held, len(train), len(held))


def weights_of(n: int, k: int = K, seed: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def rounded(
    type_name: str, weights: NDArray[np.float32], moments: Moments, threads: int = 1
) -> Rounded:
    ranges = [RowMoments(0, len(weights), moments)]
    rounder = FeedbackRounder(shared_threads(threads), threads)
    return rounder.round(encoder(type_name), weights, ranges)


def values(type_name: str, blocks: NDArray[np.uint8], k: int = K) -> NDArray[np.float32]:
    return decode(type_name, blocks, k, shared_threads(1))


@pytest.mark.parametrize("type_name", TYPES)
def test_feedback_beats_nearest_on_other_inputs(type_name: str) -> None:
    weights, moments = weights_of(16), moments_of(inputs(4096))
    result = rounded(type_name, weights, moments)
    errors = weights - values(type_name, result.blocks)
    true = np.sum((errors @ inputs(1024, seed=9).T) ** 2) / 1024
    (judged,) = result.ranges
    assert not judged.is_nearest
    np.testing.assert_allclose(judged.feedback, true, rtol=1e-4)
    assert judged.feedback < MARGINS.get(type_name, 0.75) * judged.nearest


@pytest.mark.parametrize("type_name", ["Q4_0", "Q2_K", "IQ2_S", "IQ1_M"])
def test_any_number_of_threads_gives_the_same_blocks(type_name: str) -> None:
    weights, moments = weights_of(13, 512), moments_of(inputs(600, 512))
    one, three = (rounded(type_name, weights, moments, threads) for threads in (1, 3))
    np.testing.assert_array_equal(one.blocks, three.blocks)
    assert one.ranges == three.ranges


def scales_of(type_name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, K) float32: the scale of each weight."""
    n = len(blocks)
    if type_name == "Q6_K":
        scale = blocks[:, 208:210].copy().view(np.float16).astype(np.float32)
        return np.repeat(scale * blocks[:, 192:208].view(np.int8).astype(np.float32), 16, axis=1)
    scale = blocks.reshape(n * K // 32, -1)[:, :2].copy().view(np.float16).astype(np.float32)
    return np.repeat(scale.reshape(n, K // 32), 32, axis=1)


LEVELS = {"Q4_0": np.arange(-8, 8), "IQ4_NL": IQ4_NL_VALUES, "Q6_K": np.arange(-32, 32)}


@pytest.mark.parametrize("type_name", LEVELS)
def test_codes_are_those_of_the_rule(type_name: str) -> None:
    """With the scales that were chosen, column by column, in float32."""
    weights, moments = weights_of(5), moments_of(inputs(2048))
    blocks = rounded(type_name, weights, moments).blocks
    damped = moments.train.astype(np.float64)
    damped += np.eye(K) * DAMPING * np.median(np.diagonal(moments.train).astype(np.float64))
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    shares = (upper / np.diagonal(upper)).astype(np.float32)
    scales, levels = scales_of(type_name, blocks), LEVELS[type_name].astype(np.float32)
    want, errors = np.zeros_like(weights), np.zeros_like(weights)
    for j in range(K):
        target = weights[:, j].copy()
        for i in range(j):
            target += shares[i, j] * errors[:, i]
        allowed = scales[:, j, None] * levels
        best = np.abs(target[:, None] - allowed).argmin(axis=1)
        want[:, j] = allowed[np.arange(len(weights)), best]
        errors[:, j] = weights[:, j] - want[:, j]
    np.testing.assert_array_equal(values(type_name, blocks), want)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q3_K", "IQ3_S"])
def test_without_correlations_it_is_the_nearest(type_name: str) -> None:
    """The scales may be better still, since several are tried."""
    one = np.eye(K, dtype=np.float32)
    (judged,) = rounded(type_name, weights_of(8), Moments(one, one, 1, 1)).ranges
    assert 0.85 * judged.nearest < judged.feedback <= judged.nearest


def test_fewer_tokens_than_columns_are_damped() -> None:
    few = inputs(40)
    result = rounded("Q4_0", weights_of(8), moments_of(few, held=few))
    assert result.ranges[0].feedback < 0.5 * result.ranges[0].nearest


@pytest.mark.parametrize("type_name", TYPES)
def test_zeros_stay_zeros(type_name: str) -> None:
    weights, moments = weights_of(3), moments_of(inputs(512))
    weights[1], weights[2, :128] = 0, 0
    got = values(type_name, rounded(type_name, weights, moments).blocks)
    assert np.isfinite(got).all()
    if type_name not in ("Q1_0", "IQ1_S", "IQ1_M"):  # these have no zero
        assert not got[1].any()


def test_without_inputs_held_back_the_others_judge() -> None:
    train = moments_of(inputs(512)).train
    none, both = Moments(train, np.zeros_like(train), 512, 0), Moments(train, train, 512, 512)
    weights = weights_of(4)
    assert rounded("Q4_0", weights, none).ranges == rounded("Q4_0", weights, both).ranges


def test_columns_that_nothing_reaches() -> None:
    x = inputs(512).copy()
    x[:, :200] = 0
    (judged,) = rounded("Q4_0", weights_of(4), moments_of(x, held=x)).ranges
    assert judged.feedback < judged.nearest


@pytest.mark.parametrize("type_name", ["Q4_0", "IQ2_XXS"])
def test_rows_fall_back_where_other_inputs_say_so(type_name: str) -> None:
    weights, moments = weights_of(6), moments_of(inputs(512))
    other = Moments(moments.train, np.diag(np.diagonal(moments.train)), 512, 512)
    ranges = [RowMoments(0, 2, moments_of(inputs(4096))), RowMoments(2, 4, other)]
    result = FeedbackRounder(shared_threads(1)).round(encoder(type_name), weights, ranges)
    assert [r.is_nearest for r in result.ranges] == [False, True]
    importance = np.diagonal(moments.train) / np.float32(512)
    nearest = encoder(type_name).encode(weights[2:], importance, shared_threads(1))
    np.testing.assert_array_equal(result.blocks[2:], nearest)


@pytest.mark.parametrize("type_name", ["Q4_0", "IQ2_XXS"])
def test_rows_without_moments_are_rounded_to_the_nearest(type_name: str) -> None:
    weights, none = weights_of(2), np.zeros((K, K), np.float32)
    result = rounded(type_name, weights, Moments(none, none))
    assert result.ranges[0].is_nearest
    ones = np.ones(K, np.float32) if type_name in IMPORTANCE_TYPES else None
    want = encoder(type_name).encode(weights, ones, shared_threads(1))
    np.testing.assert_array_equal(result.blocks, want)


def test_what_is_not_finite_is_refused() -> None:
    weights, moments = weights_of(9), moments_of(inputs(512))
    moments.held[3, 4] = np.nan
    with pytest.raises(InputError, match="NaN"):
        rounded("Q4_0", weights, moments)
    weights[7, 200] = np.inf
    with pytest.raises(InputError, match="row 7, column 200"):
        rounded("Q4_0", weights, moments_of(inputs(512)))
    with pytest.raises(InputError, match=r"Q4_0 cannot hold .*row 2"):
        rounded(
            "Q4_0",
            np.where(np.arange(9)[:, None] == 2, np.float32(1e9), 0) * weights_of(9),
            moments_of(inputs(512)),
        )


def test_moments_must_cover_the_rows() -> None:
    weights, moments = weights_of(4), moments_of(inputs(512))
    for ranges in ([RowMoments(0, 3, moments)], [RowMoments(1, 3, moments)]):
        with pytest.raises(InputError, match="row"):
            FeedbackRounder(shared_threads(1)).round(encoder("Q4_0"), weights, ranges)
    with pytest.raises(InputError, match="shape"):
        rounded("Q4_0", weights_of(4, 512), moments)


def test_a_rounder_keeps_no_factor_of_other_moments() -> None:
    """Also of moments that were freed, whose place in memory others take."""
    rounder, weights = FeedbackRounder(shared_threads(1)), weights_of(4)
    for seed in range(8):
        own = [RowMoments(0, 4, moments_of(inputs(512, seed=seed)))]
        again = rounder.round(encoder("Q4_0"), weights, own)
        alone = FeedbackRounder(shared_threads(1)).round(encoder("Q4_0"), weights, own)
        np.testing.assert_array_equal(again.blocks, alone.blocks)
        del own
