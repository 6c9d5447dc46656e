"""The forward pass that the quality table is measured with is mlx-lm's."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from tests.benchmarks.demo_forward import logits
from tests.benchmarks.quality import MODEL, affine, is_linear, mixed, plain_weights


@pytest.mark.long
def test_numpy_computes_what_mlx_lm_does_and_bits_are_counted() -> None:
    weights, config = plain_weights(), json.loads((MODEL / "config.json").read_text())
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], 24).astype(np.int32)
    expected = np.array(load_model(MODEL)[0](mx.array(tokens)[None]))[0]
    np.testing.assert_allclose(logits(weights, config, tokens), expected, atol=2e-3)

    assert sum(map(is_linear, weights)) == 7 * config["num_hidden_layers"]
    assert affine(weights, lambda _: (4, 64))[1] == 4.5
    assert affine(weights, lambda _: (3, 128))[1] == 3.25
    assert abs(affine(weights, mixed(weights, 3.16))[1] - 3.16) < 0.02
