"""A linear layer into EXL3: what the encoder thinks of it is what the reference decodes; feedback pays."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.exl3_encode import Floats, best_scale, make_trellis
from kernels.exl3_encode_linear import encode_linear
from kernels.exl3_reference import Codebook, States, dense


def fast_search(tiles: Floats, bits: int, codebook: Codebook) -> States:
    """Closed walks that take no time to find: the first weight's nearest state, then zeros."""
    values = make_trellis(bits, codebook).values
    order = np.argsort(values, kind="stable")
    found = np.zeros(tiles.shape, np.uint16)
    found[:, 0] = order[np.searchsorted(values[order], tiles[:, 0]).clip(0, 65535)]
    stream = np.zeros((len(tiles), 256 * bits), np.uint8)
    stream[:, :16] = (found[:, :1] >> np.arange(15, -1, -1)) & 1
    ends = (np.arange(256)[:, None] + 1) * bits
    window = stream[:, (ends - 16 + np.arange(16)) % (256 * bits)].astype(np.uint32)
    return (window << np.arange(15, -1, -1, dtype=np.uint32)).sum(-1).astype(np.uint16)


def a_layer(rng: np.random.Generator, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights with rows of very different size and some outliers, inputs that depend on each other."""
    weight = rng.standard_normal((out, inner)) * np.exp(rng.standard_normal(out))[:, None]
    weight[rng.integers(0, out, 5), rng.integers(0, inner, 5)] *= 30
    inputs = rng.standard_normal((400, inner // 3)) @ rng.standard_normal((inner // 3, inner))
    inputs += 0.3 * rng.standard_normal((400, inner))
    return weight.astype(np.float32), inputs.T @ inputs


@pytest.mark.parametrize(("out", "inner"), [(128, 128), (136, 200)])
def test_what_it_reports_is_what_the_reference_decodes(out: int, inner: int) -> None:
    """Padded sizes, too: loss and error, computed from the stored tensors alone."""
    weight, covariance = a_layer(np.random.default_rng(1), out, inner)
    found = encode_linear(weight, covariance, 4, "mcg", seed=5, search=fast_search)
    assert found.trellis.shape[2] == 64
    assert found.suh.dtype == found.svh.dtype == np.float16
    decoded = dense(found.trellis, found.suh, found.svh, "mcg")[:out, :inner]
    error = np.sum((decoded - weight) ** 2) / np.sum(weight.astype(np.float64) ** 2)
    assert found.error == pytest.approx(error, rel=0.02)  # the padding holds a little


@pytest.mark.long
def test_four_bits_with_feedback_and_without() -> None:
    """The real search: within what the trellis promises, and the errors fed back where they cost least."""
    weight, covariance = a_layer(np.random.default_rng(2), 128, 128)
    with_feedback = encode_linear(weight, covariance, 4, "mcg", seed=5)
    without = encode_linear(weight, None, 4, "mcg", seed=5)
    decoded = dense(without.trellis, without.suh, without.svh, "mcg")
    difference = (decoded - weight).T
    loss = np.sum(difference * (covariance @ difference)) / np.sum(weight.T * (covariance @ weight.T))
    assert without.error < 1.35 * 4.0**-4
    assert without.error < with_feedback.error
    assert with_feedback.loss < 0.7 * loss


def test_the_same_bytes_for_the_same_seed_alone() -> None:
    weight, covariance = a_layer(np.random.default_rng(3), 128, 128)
    first, again, other = (
        encode_linear(weight, covariance, 2, "mcg", seed=seed, search=fast_search) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.trellis, again.trellis)
    np.testing.assert_array_equal(first.suh, again.suh)
    np.testing.assert_array_equal(first.svh, again.svh)
    assert (first.suh != other.suh).any()


def test_a_layer_of_zeros_and_inputs_that_never_were() -> None:
    found = encode_linear(np.zeros((128, 128)), np.zeros((128, 128)), 3, "mcg", seed=0, search=fast_search)
    assert np.isfinite(found.svh).all()
    assert np.abs(dense(found.trellis, found.suh, found.svh, "mcg")).max() < 1e-2


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="its weights are not finite"):
        encode_linear(np.full((128, 128), np.nan), None, 3, "mcg", seed=0)


def test_the_scale_leaves_the_deviation_that_the_codebook_wants() -> None:
    seen: list[float] = []

    def watch(tiles: Floats, bits: int, codebook: Codebook) -> States:
        seen.append(float(tiles.std()))
        return fast_search(tiles, bits, codebook)

    weight, _ = a_layer(np.random.default_rng(4), 256, 128)
    encode_linear(weight, None, 3, "mcg", seed=0, search=watch)
    assert np.mean(seen) == pytest.approx(1 / best_scale(3, "mcg"), rel=0.02)
