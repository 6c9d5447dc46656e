"""Sampling values: the request's, else the model's own, else OpenAI's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.api.errors import ApiError
from cluster.api.sampling import SamplingDefaults, read_sampling, with_seed
from cluster.api.schema import CompletionBody
from cluster.api.service import served_names

OPENAI = SamplingDefaults()


def test_the_models_own_defaults(tmp_path: Path) -> None:
    assert SamplingDefaults.read(tmp_path) == OPENAI
    content = {"temperature": 0.5, "top_p": 0.75, "top_k": 20, "repetition_penalty": 1.25, "eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    defaults = SamplingDefaults.read(tmp_path)
    assert defaults == SamplingDefaults(0.5, 0.75, 20, 0.0, 1.25)
    sampling = read_sampling(CompletionBody(top_p=1.0), defaults, frozenset({7}), 100)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 1.0, 20)
    assert list(sampling.stop_ids) == [7]


def test_defaults_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": "hot", "top_p": 7, "top_k": None, "min_p": 0.25}))
    assert SamplingDefaults.read(tmp_path) == SamplingDefaults(min_p=0.25)
    for content in ("{", "[]", "5"):
        path.write_text(content)
        assert SamplingDefaults.read(tmp_path) == OPENAI


def test_seeds_of_choices() -> None:
    sampling = read_sampling(CompletionBody(seed=2**64 - 1), OPENAI, frozenset(), 100)
    assert [with_seed(sampling, choice).seed for choice in range(3)] == [2**64 - 1, 0, 1]
    assert read_sampling(CompletionBody(seed=0), OPENAI, frozenset(), 100).seed == 0


@pytest.mark.parametrize("name", ["05", "+5", "5.0", " 5", "٥", "", "99999999999"])
def test_names_that_are_no_token_ids(name: str) -> None:
    with pytest.raises(ApiError, match=r"^logit_bias: .* is not a token id\.$"):
        read_sampling(CompletionBody(logit_bias={name: 1.0}), OPENAI, frozenset(), 100)


def test_served_names(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert served_names("models/tiny", tmp_path) == ("tiny", "models/tiny")
    assert served_names(str(tmp_path / "models" / "tiny"), Path("/")) == (
        "tiny",
        str(tmp_path / "models" / "tiny"),
    )
    assert served_names("mlx-community/Qwen3-1.7B-8bit", tmp_path) == ("mlx-community/Qwen3-1.7B-8bit",)
