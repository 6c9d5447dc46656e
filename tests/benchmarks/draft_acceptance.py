"""How often a draft model is right: by temperature, by whose noise it draws with, and by threshold.

    python -m tests.benchmarks.draft_acceptance [--draft-layers 0,1,2,3,7,8] [--prompts 6]

One process: the demo model answers held-out prompts of its domain, then its draft model (the demo model less
some of its layers) guesses windows of at most 8 tokens behind what was answered, as on a ring without frames
ahead. Its own noise: the draft model draws with another seed than the last stage. A trip brings the guesses
that were right and one token more. right: of the guesses up to the first wrong one of their window.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import mlx.core as mx

from cluster.drafter import DraftCall, Drafter
from cluster.sampler import Sampler
from deploy.bench_prompts import prompts
from planner.draft_bytes import session_bytes
from planner.model_profile import read_model_profile
from proto import ring_pb2
from shard_loader.shard import Shard
from shard_loader.weights import load_shard
from tests.pruned_model import write_pruned

DEMO = Path(__file__).parent.parent.parent / "deploy" / "demo" / "model"
NUM_LAYERS, VOCAB_SIZE = 9, 4096
MAX_DRAFTS = 8


@dataclass(slots=True)
class Tally:
    """Of many windows."""

    num_trips: int = 0
    num_tokens: int = 0
    num_guessed: int = 0  # until the first wrong one of each window
    num_right: int = 0
    num_sent: int = 0

    def row(self) -> str:
        """Cells of a table."""
        share = self.num_right / max(1, self.num_guessed)
        return (
            f"{share:.0%} | {self.num_tokens / self.num_trips:.2f} | {self.num_sent / self.num_trips:.1f} | "
            f"{self.num_right / max(1, self.num_sent):.0%}"
        )


def answer(shard: Shard, prompt: list[int], sampling: ring_pb2.Sampling, num_tokens: int) -> list[int]:
    """What the ring answers."""
    sampler, state, tokens = Sampler(sampling, VOCAB_SIZE), shard.new_state(), list(prompt)
    for _ in range(num_tokens):
        logits = shard.forward(mx.array([tokens[state.position :]]), None, state)[0, -1]
        draw = sampler.draw(logits, len(tokens), (), len(prompt))
        mx.eval(draw.arrays(), state.arrays())
        tokens.append(draw.finish().id)
    return tokens[len(prompt) :]


def windows(
    drafter: Drafter, session: int, prompt: list[int], text: list[int], sampling: ring_pb2.Sampling
) -> Tally:
    """The trips of one answer."""
    found, at = Tally(), 1  # the first token comes with the prompt
    while at < len(text):
        wanted = min(MAX_DRAFTS, len(text) - at - 1)
        tokens = [*prompt, *text[:at]]
        guesses: list[int] = []
        while not drafter.draft(DraftCall(session, tokens, 0, sampling, len(prompt))):
            if len(drafter.readings.open(session, tokens, len(tokens)).tokens) >= len(tokens) - 16:  # type: ignore[union-attr]
                break
        if wanted:
            guesses = drafter.draft(DraftCall(session, tokens, wanted, sampling, len(prompt)))
        right = 0
        while right < len(guesses) and guesses[right] == text[at + right]:
            right += 1
        found.num_trips += 1
        found.num_tokens += right + 1
        found.num_sent += len(guesses)
        found.num_right += right
        found.num_guessed += right + (right < len(guesses))
        at += right + 1
    drafter.close(session)
    return found


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--draft-layers", default="0,1,2,3,7,8", help="of the demo model's nine")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--heats", default="0,0.7,1")
    parser.add_argument("--thresholds", default="0,0.2,0.4,0.6")
    args = parser.parse_args()
    target = load_shard(DEMO, 0, NUM_LAYERS)
    with tempfile.TemporaryDirectory() as place:
        folder = write_pruned(DEMO, Path(place), [int(n) for n in args.draft_layers.split(",")])
        profile = read_model_profile(folder)
        shard = load_shard(folder, 0, profile.num_layers)
    texts = list(islice(prompts("demo", VOCAB_SIZE, args.prompt_tokens, 0), args.prompts))
    print(
        "| temperature | noise | threshold | right | tokens a trip | guesses a trip | right of those sent |"
    )
    print("|---|---|---|---|---|---|---|")
    session = 0
    for heat in map(float, args.heats.split(",")):
        asked = [ring_pb2.Sampling(temperature=heat, seed=n + 1) for n in range(len(texts))]
        answers = [answer(target, p, s, args.output_tokens) for p, s in zip(texts, asked, strict=True)]
        for is_shared in (True, False) if heat else (True,):
            for threshold in map(float, args.thresholds.split(",")) if is_shared else (0.0,):
                drafter = Drafter(
                    shard,
                    "draft",
                    vocab_size=VOCAB_SIZE,
                    max_context=4096,
                    kv_bytes=partial(session_bytes, profile),
                    max_kv_bytes=10**9,
                    min_confidence=threshold,
                )
                total = Tally()
                for prompt, text, sampling in zip(texts, answers, asked, strict=True):
                    session += 1
                    own = ring_pb2.Sampling(temperature=heat, seed=sampling.seed + (0 if is_shared else 777))
                    one = windows(drafter, session, prompt, text, own)
                    for name in ("num_trips", "num_tokens", "num_guessed", "num_right", "num_sent"):
                        setattr(total, name, getattr(total, name) + getattr(one, name))
                noise = "the last stage's" if is_shared else "its own"
                print(f"| {heat:g} | {noise} | {threshold:g} | {total.row()} |", flush=True)


if __name__ == "__main__":
    main()
