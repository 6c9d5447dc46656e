"""What the clients of a soak ask, and what each request's answer is when it has plain mlx-lm to itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from cluster.random_draws import filtered
from cluster.room import DEFAULT_PREFILL_CHUNK
from cluster.sampler import Sampler, draw_key
from cluster.tokenizer import Tokenizer, load_tokenizer
from proto import ring_pb2
from tests.tiny_models import EOS_ID, NUM_BYTES, VOCAB_SIZE

MAX_PROMPT, MAX_TOKENS = 300, 48
SAMPLED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20},
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of /v1/completions. sampling: of its body and of the head alike."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: dict[str, Any]
    ignores_eos: bool = False
    has_logprobs: bool = False
    stop: str = ""

    @property
    def body(self) -> dict[str, Any]:
        """Its JSON."""
        body: dict[str, Any] = {"prompt": list(self.prompt), "max_tokens": self.max_tokens, **self.sampling}
        body |= {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
        if self.ignores_eos:
            body["ignore_eos"] = True
        if self.has_logprobs:
            body["logprobs"] = 2
        if self.stop:
            body["stop"] = [self.stop]
        return body


@dataclass(frozen=True, slots=True)
class Lone:
    """A whole answer."""

    ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...]


@dataclass(slots=True)
class Alone:
    """Plain mlx-lm, one request at a time."""

    directory: Path
    _model: Any = field(init=False)
    _tokenizer: Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        self._model, _ = load_model(self.directory)
        self._tokenizer = load_tokenizer(self.directory)

    def answer(self, ask: Ask) -> Lone:
        """As the ring answers, where nobody else asks anything."""
        sampler, logits_after = self._sampler(ask), self._begin(ask.prompt)
        history, ids, logprobs, pieces = list(ask.prompt), [], [], []
        detokenizer = self._tokenizer.detokenizer(ask.prompt)
        reason = "length"
        while len(ids) < ask.max_tokens:
            draw = sampler.draw(logits_after(history[-1]), len(history), history, len(ask.prompt))
            mx.eval(draw.arrays())
            token = draw.finish()
            history.append(token.id)
            ids.append(token.id)
            logprobs.append(token.logprob)
            if token.id == EOS_ID and not ask.ignores_eos:
                reason = "stop"
                break
            pieces.append(detokenizer.add(token.id))
            if ask.stop and (at := "".join(pieces).find(ask.stop)) >= 0:
                return Lone(tuple(ids), "".join(pieces)[:at], "stop", tuple(logprobs))
        return Lone(tuple(ids), "".join(pieces) + detokenizer.flush(), reason, tuple(logprobs))

    def with_stop(self, ask: Ask, rng: random.Random) -> Ask:
        """The same with a stop string out of the middle of its answer, if that has a plain character."""
        text = self.answer(ask).text
        plain = [c for c in text[len(text) // 3 :] if c.isascii() and c.isprintable()]
        return replace(ask, stop=rng.choice(plain)) if plain else ask

    def gap(self, ask: Ask, ids: Sequence[int], other: int) -> float:
        """By how much the score of the last of `ids`, which is drawn alone, lies above that of `other`.

        Where sums are rounded in another order, two scores as near as that may change places.
        """
        sampler, logits_after = self._sampler(ask), self._begin(ask.prompt)
        history = [*ask.prompt, *ids[:-1]]
        for token in history[len(ask.prompt) - 1 : -1]:
            logits_after(token)
        scores = logits_after(history[-1]).astype(mx.float32)
        if ask.sampling["temperature"]:
            scores = filtered(scores[None], [sampler.odds])[0] / ask.sampling["temperature"]
            key = mx.array(draw_key(ask.sampling["seed"], len(history)), dtype=mx.uint32)
            scores = scores + mx.random.gumbel(scores.shape, key=key)
        return float((scores[ids[-1]] - scores[other]).item())

    def _sampler(self, ask: Ask) -> Sampler:
        return Sampler(ring_pb2.Sampling(**ask.sampling, logprobs=True), VOCAB_SIZE)

    def _begin(self, prompt: Sequence[int]) -> Any:
        """Reads all of the prompt but its last token; what it gives turns a token into the next logits."""
        cache = make_prompt_cache(self._model)
        for start in range(0, len(prompt) - 1, DEFAULT_PREFILL_CHUNK):
            chunk = prompt[start : min(start + DEFAULT_PREFILL_CHUNK, len(prompt) - 1)]
            self._model(mx.array(chunk)[None], cache=cache)
        return partial(self._logits, cache)

    def _logits(self, cache: Any, token: int) -> mx.array:
        return self._model(mx.array([[token]]), cache=cache)[0, -1]  # (vocab,)


def draw_asks(rng: random.Random, count: int, alone: Alone) -> list[Ask]:
    """Different requests; half of the prompts begin like others, a few go on where an answer ended."""
    asks: list[Ask] = []
    for number in range(count):
        begin: tuple[int, ...] = ()
        if asks and rng.random() < 0.5:
            other = rng.choice(asks)
            begin = other.prompt[: rng.randint(1, len(other.prompt))]
            if rng.random() < 0.3:
                begin = other.prompt + alone.answer(replace(other, stop="")).ids
        fresh = rng.choice((1, 3, 20, 40, 90))
        prompt = (*begin, *(rng.randrange(NUM_BYTES) for _ in range(fresh)))[-MAX_PROMPT:]
        ask = Ask(
            prompt,
            rng.choice((1, 2, 8, 16, 24, 32, MAX_TOKENS)),
            rng.choice(SAMPLED) | {"seed": number},
            ignores_eos=rng.random() < 0.5,
            has_logprobs=rng.random() < 0.25,
        )
        asks.append(alone.with_stop(ask, rng) if rng.random() < 0.2 else ask)
    return asks
