"""The sampling part of a request as the head wants it. Pure."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster.api.errors import bad_request
from cluster.api.schema import ChatBody, CompletionBody, GenerateBody
from cluster.sampling_values import validate
from proto import ring_pb2

_MASK64 = (1 << 64) - 1
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What holds where a request says nothing: OpenAI's values, or the model's own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, model_dir: Path) -> SamplingDefaults:
        """Those of generation_config.json, as vLLM reads them; values out of range are left out."""
        path = model_dir / "generation_config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return cls()
        if not isinstance(content, dict):
            return cls()
        return cls(
            **{name: value for name in _DEFAULTED if (value := _valid(name, content.get(name))) is not None}
        )


def _valid(name: str, value: Any) -> Any:
    try:
        return getattr(GenerateBody.model_validate({name: value}), name)
    except ValueError:
        return None


def read_sampling(
    body: GenerateBody, defaults: SamplingDefaults, eos_ids: frozenset[int], vocab_size: int
) -> ring_pb2.Sampling:
    """Everything but the seed of each choice (`with_seed`). Raises ApiError."""
    sampling = ring_pb2.Sampling(
        temperature=_or(body.temperature, defaults.temperature),
        top_p=_or(body.top_p, defaults.top_p),
        top_k=max(_or(body.top_k, defaults.top_k), 0),
        min_p=_or(body.min_p, defaults.min_p),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        repetition_context=body.repetition_context_size or 0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=(secrets.randbits(64) if body.seed is None else body.seed) & _MASK64,
        min_tokens=body.min_tokens or 0,
    )
    for name, bias in (body.logit_bias or {}).items():
        sampling.logit_bias[_token_id(name, vocab_size)] = bias
    stop_ids = set(body.stop_token_ids or ())
    for token in stop_ids:
        _check_id(token, vocab_size, "stop_token_ids")
    sampling.stop_ids.extend(sorted(stop_ids if body.ignore_eos else stop_ids | eos_ids))
    sampling.logprobs, sampling.top_logprobs = _logprobs(body)
    sampling.prompt_logprobs = isinstance(body, CompletionBody) and bool(body.echo) and sampling.logprobs
    return sampling


def check_sampling(sampling: ring_pb2.Sampling, vocab_size: int) -> None:
    """What the head would refuse, by the name of its field; raises ApiError."""
    try:
        validate(sampling, vocab_size)
    except ValueError as error:
        raise bad_request(str(error), str(error).partition(":")[0], "invalid_value") from None


def with_seed(sampling: ring_pb2.Sampling, choice: int) -> ring_pb2.Sampling:
    """A copy for one of several choices: the first has the request's own seed."""
    copy = ring_pb2.Sampling()
    copy.CopyFrom(sampling)
    copy.seed = (sampling.seed + choice) & _MASK64
    return copy


def _logprobs(body: GenerateBody) -> tuple[bool, int]:
    if isinstance(body, ChatBody):
        return bool(body.logprobs), body.top_logprobs or 0
    if isinstance(body, CompletionBody):
        return body.logprobs is not None, body.logprobs or 0
    return False, 0


def _token_id(name: str, vocab_size: int) -> int:
    if not (name.isascii() and name.isdigit() and len(name) <= 10 and name == str(int(name))):
        raise bad_request(
            f"logit_bias: {json.dumps(name)[:40]} is not a token id.", "logit_bias", "invalid_value"
        )
    return _check_id(int(name), vocab_size, "logit_bias")


def _check_id(token: int, vocab_size: int, field: str) -> int:
    if not 0 <= token < vocab_size:
        raise bad_request(
            f"{field}: the token id {token} is not in the vocabulary (0 to {vocab_size - 1}).",
            field,
            "invalid_value",
        )
    return token


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
