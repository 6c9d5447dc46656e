"""Log-probabilities of a prompt's tokens: bit for bit those of mlx-lm, which reads it in the same chunks."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from cluster.room import DEFAULT_PREFILL_CHUNK
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.tiny_models import write_checkpoint

CHUNK = DEFAULT_PREFILL_CHUNK // 8
PROMPT = [(7 * i + i // 5) % 251 for i in range(3 * CHUNK + 5)]
LONG = partial(pytest.param, marks=pytest.mark.long)
LAYERS = [(0, 2), (2, 4), (4, 5)]


def scores(model: Path, prompt: Sequence[int], num_top: int) -> list[tuple[int, float, list[float]]]:
    """Of each token but the first: its id, its log-probability and the largest ones in its place."""
    network = load_model(model)[0]
    cache = make_prompt_cache(network)
    ends = [*range(CHUNK, len(prompt) - 1, CHUNK), len(prompt) - 1]
    rows = []
    for start, end in zip([0, *ends], ends, strict=False):
        rows.append(network(mx.array([prompt[start:end]]), cache=cache)[0])
        mx.eval(rows[-1], [c.state for c in cache])
    logits = mx.concatenate(rows).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    top = mx.sort(logprobs, axis=-1)[:, -num_top:]
    return [
        (token, float(logprobs[i, token].item()), sorted(map(float, top[i].tolist()), reverse=True))  # type: ignore[arg-type]
        for i, token in enumerate(prompt[1:])
    ]


@pytest.mark.parametrize("architecture", ["llama", LONG("mamba2"), LONG("gemma3_text")])
def test_a_prompt_is_scored_as_mlx_lm_would(architecture: str, tmp_path: Path) -> None:
    model = write_checkpoint(architecture, tmp_path / "model", num_layers=5)
    expected = scores(model, PROMPT, 3)
    with RingProcesses(tmp_path, model, LAYERS) as ring, ThreadPoolExecutor(4) as pool:
        ring.wait_ok()
        others = [pool.submit(ring.tokens, [3, 5 + i], 60) for i in range(3)]  # whose tokens share its frames
        for _ in range(2):  # what is kept of the first is of no use to the second: all of it is read
            replies = ring.generate(PROMPT, 4, logprobs=True, top_logprobs=3, prompt_logprobs=True)
            got = [token for reply in replies for token in reply.prompt]
            assert [(t.id, t.logprob, [top.logprob for top in t.top]) for t in got] == expected
            answer, _ = greedy(model, PROMPT, 4, chunk=CHUNK)
            assert [t.id for reply in replies for t in reply.tokens] == answer
            assert replies[-1].cached_tokens == 0
        for i, other in enumerate(others):
            assert other.result() == greedy(model, [3, 5 + i], 60)[0]
        assert not [token for reply in ring.generate([9], 2, prompt_logprobs=True) for token in reply.prompt]
