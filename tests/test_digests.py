"""Digests tell checkpoints apart, and not their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.digests import model_digest, sample_files
from tests.fake_models import llama_config, llama_tensors, write_model
from tests.test_headers import two_files
from tests.tiny_models import write_checkpoint


def test_the_digest_is_of_the_model_not_of_its_files(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", llama_config(), llama_tensors())
    assert model_digest(one) == model_digest(two_files(tmp_path / "two"))
    assert len(model_digest(one)) == 16


@pytest.mark.parametrize("overrides", [{"vocab_size": 321}, {"rope_theta": 1.0}])
def test_the_digest_tells_configs_apart(tmp_path: Path, overrides: dict[str, object]) -> None:
    one = write_model(tmp_path / "one", llama_config(), llama_tensors())
    other = write_model(tmp_path / "other", llama_config(**overrides), llama_tensors())
    assert model_digest(one) != model_digest(other)


def test_the_digest_tells_tensors_apart(tmp_path: Path) -> None:
    digests = {
        model_digest(write_model(tmp_path / name, llama_config(), tensors))
        for name, tensors in (
            ("a", llama_tensors()),
            ("b", llama_tensors(dtype="F16")),
            ("c", llama_tensors() | {"model.norm.weight": ("BF16", (65,))}),
            ("d", llama_tensors() | {"more": ("BF16", (1,))}),
        )
    }
    assert len(digests) == 4


def test_samples_tell_other_weights_apart(tmp_path: Path) -> None:
    one, same, other = (
        write_checkpoint("llama", tmp_path / str(i), num_layers=2, seed=i // 2) for i in range(3)
    )
    assert model_digest(one) == model_digest(other)
    assert sample_files(one) == sample_files(same)
    assert sample_files(one).keys() == {"model.safetensors"}
    assert sample_files(one) != sample_files(other)
