"""Rotary positions: frequencies against the formulas of their sources, rotations against complex numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from shardlm import LinearScaling, Llama3Scaling, Rope
from shardlm.models.rope import frequencies, rotate, rotations

HEAD_DIM = 10
# Wavelengths from 6 to 16000 positions on an original context of 64: some of each regime.
SCALING = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)


def llama3(base, scaling):
    """The scaling of Llama 3.1 by wavelength, as Meta's code states it."""
    result, regimes = [], []
    for frequency in base:
        wavelength = 2 * math.pi / frequency
        if wavelength < scaling.original_length / scaling.high_frequency_factor:
            regimes.append("kept")
            result.append(frequency)
        elif wavelength > scaling.original_length / scaling.low_frequency_factor:
            regimes.append("scaled")
            result.append(frequency / scaling.factor)
        else:
            regimes.append("between")
            span = scaling.high_frequency_factor - scaling.low_frequency_factor
            smooth = (scaling.original_length / wavelength - scaling.low_frequency_factor) / span
            result.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return result, regimes


def turned(rope, x, positions):
    """Pairs (i, i + d/2) as complex numbers, multiplied by exp(i angle); x[batch, heads, sequence, d]."""
    half = x.shape[-1] // 2
    angles = np.multiply.outer(positions, frequencies(rope, x.shape[-1]))[:, None]
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def sample(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def apply(rope, x, positions):
    return np.asarray(rotate(jnp.asarray(x), *rotations(rope, x.shape[-1], jnp.asarray(positions), jnp.float64)))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_frequencies_fall_from_one_by_equal_factors(theta, head_dim):
    want = [1 / theta ** (2 * i / head_dim) for i in range(head_dim // 2)]
    np.testing.assert_allclose(frequencies(Rope(theta=theta), head_dim), want, rtol=1e-14)


def test_linear_scaling_divides_every_frequency():
    plain, scaled = frequencies(Rope(), HEAD_DIM), frequencies(Rope(scaling=LinearScaling(factor=4.0)), HEAD_DIM)
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-14)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_llama3_scaling_keeps_short_waves_divides_long_ones_and_ramps_between(theta):
    base = frequencies(Rope(theta=theta), 16)
    want, regimes = llama3(base, SCALING)
    assert set(regimes) == {"kept", "between", "scaled"}
    np.testing.assert_allclose(frequencies(Rope(theta=theta, scaling=SCALING), 16), want, rtol=1e-13)


def test_angles_are_positions_times_frequencies(x64):
    positions = jnp.array([[0, 1, 5], [7, 2, 131_071]])
    cosine, sine = rotations(Rope(), HEAD_DIM, positions, jnp.float64)
    assert cosine.shape == sine.shape == (2, 1, 3, HEAD_DIM // 2)
    angles = np.multiply.outer(np.asarray(positions), frequencies(Rope(), HEAD_DIM))[:, None]
    # The angle, of up to 131,071 radians, is rounded before its cosine is taken.
    np.testing.assert_allclose(cosine, np.cos(angles), atol=131_071 * 2.0**-52)
    np.testing.assert_allclose(sine, np.sin(angles), atol=131_071 * 2.0**-52)


@pytest.mark.parametrize(
    "rope", [Rope(), Rope(scaling=SCALING), Rope(theta=50.0, scaling=LinearScaling(factor=3.0))], ids=str
)
def test_a_rotation_is_a_complex_product(rope, x64):
    x, positions = sample(2, 3, 5, HEAD_DIM), np.array([[0, 1, 2, 3, 4], [9, 0, 1, 77, 2]])
    got = apply(rope, x, positions)
    np.testing.assert_allclose(got, turned(rope, x, positions), atol=1e-13)
    assert np.abs(got - turned(rope, x, positions + [0, 0, 0, 0, 1])).max() > 0.1  # one position off shows


def test_position_zero_changes_nothing_and_lengths_are_kept(x64):
    x = sample(1, 3, 5, HEAD_DIM)
    np.testing.assert_array_equal(apply(Rope(), x, np.zeros((1, 5), int)), x)
    moved = apply(Rope(), x, np.array([[3, 1, 4, 1, 5]]))
    np.testing.assert_allclose(np.linalg.norm(moved, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-13)


def test_scores_depend_on_the_distance_alone(x64):
    q, k, positions = sample(1, 1, 5, HEAD_DIM), sample(1, 1, 5, HEAD_DIM, seed=1), np.array([[0, 1, 2, 5, 11]])

    def scores(q_positions, k_positions):
        return apply(Rope(), q, q_positions)[0, 0] @ apply(Rope(), k, k_positions)[0, 0].T

    want = scores(positions, positions)
    np.testing.assert_allclose(scores(positions + 1000, positions + 1000), want, atol=1e-11)
    assert np.abs(scores(positions + 1, positions) - want).max() > 0.1


def test_linear_scaling_interpolates_positions(x64):
    x, positions = sample(1, 2, 5, HEAD_DIM), np.array([[0, 1, 2, 3, 4]])
    scaled = apply(Rope(scaling=LinearScaling(factor=4.0)), x, 4 * positions)
    np.testing.assert_allclose(scaled, apply(Rope(), x, positions), atol=1e-13)


def test_bfloat16_is_rotated_in_float32_and_rounded_once():
    x = jnp.asarray(sample(1, 2, 5, HEAD_DIM), jnp.bfloat16)
    positions = np.array([[0, 300, 1001, 3, 4]])  # 1001 is not a number of bfloat16
    got = rotate(x, *rotations(Rope(), HEAD_DIM, jnp.asarray(positions), jnp.float32))
    assert got.dtype == jnp.bfloat16
    want = turned(Rope(), np.asarray(x, np.float64), positions)
    # Half a unit in the last of bfloat16's 8 bits, and the float32 error of an angle of 1001 radians.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2.0**-8, atol=1001 * 2.0**-23)
