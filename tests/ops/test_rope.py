"""Rotary embedding against float64: angles, Llama-3.1's scaling, the rotation."""

import jax.numpy as jnp
import numpy as np

from llamajax.config.model_schema import RopeScaling
from llamajax.ops.rope import angles, frequencies, rotate

THETA, H = 12_345.0, 16


def test_frequencies_fall_geometrically():
    expected = [THETA ** (-2 * i / H) for i in range(H // 2)]
    np.testing.assert_allclose(frequencies(H, theta=THETA, scaling=None), expected, rtol=1e-7)


def test_llama3_slows_long_wavelengths_and_blends_in_between():
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64
    )
    expected, kinds = [], set()
    for turn in (THETA ** (-2 * i / H) for i in range(H // 2)):
        wavelength = 2 * np.pi / turn
        if wavelength < 64 / 4.0:
            kinds.add("kept")
            expected.append(turn)
        elif wavelength > 64 / 1.0:
            kinds.add("slowed")
            expected.append(turn / 8.0)
        else:
            kinds.add("blended")
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * turn / 8.0 + smooth * turn)
    assert kinds == {"kept", "slowed", "blended"}
    np.testing.assert_allclose(frequencies(H, theta=THETA, scaling=scaling), expected, rtol=1e-6)


def test_pairs_half_a_head_apart_turn_as_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, H)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 0, 90]], np.int32)
    turn = frequencies(H, theta=THETA, scaling=None)
    found = rotate(jnp.asarray(x), angles(jnp.asarray(positions), turn))
    z = x[..., : H // 2] + 1j * x[..., H // 2 :].astype(np.float64)
    z = z * np.exp(1j * positions[:, :, None, None] * turn.astype(np.float64))
    expected = np.concatenate([z.real, z.imag], axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_array_equal(found[0, 0], x[0, 0])  # position 0 does not turn
