"""What holding an answer to a grammar costs the last stage: CPU milliseconds per token.

    python -m tests.benchmarks.grammar_cost [--model FOLDER] [--rounds 5]

FOLDER needs no weights, only a tokenizer and config.json; the demo model's has 4096 tokens. Each grammar is
followed along a text of its own, token by token, with random logits: with the guide and without, in turn.
`draw` is the CPU time of a whole draw, all threads; `mask` of it is the guide's part, on the compute thread,
with its 99th percentile and its worst. `compile` is once for an answer, on a thread beside, while its prompt
is read; the first answer of all waits for the view of the vocabulary too, whose time and memory come first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from cluster.grammar import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar
from cluster.guide import Guide, Guides
from cluster.sampler import Sampler
from cluster.tokenizer import load_tokenizer
from proto import ring_pb2

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "model"
_WORDS = (
    "The quick brown fox jumps over the lazy dog, und zwölf Boxkämpfer jagen Viktor quer über den Deich. "
)
_PERSON = {
    "name": "Ada Lovelace",
    "age": 36,
    "tags": ["red", "grün"],
    "home": {"street": "Main", "number": -1.5},
}
_HOME = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 30}, "number": {"type": "number"}},
    "required": ["street", "number"],
    "additionalProperties": False,
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "grün"]}},
        "home": {"anyOf": [_HOME, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
CASES = {
    "json_object": (json_object_grammar(), json.dumps({"text": _WORDS * 3, "list": [_PERSON, 1, None] * 3})),
    "json_schema": (json_schema_grammar(_SCHEMA), json.dumps(_PERSON, ensure_ascii=False)),
    "long strings": (
        json_schema_grammar({"type": "array", "items": {"type": "string", "maxLength": 2000}}),
        json.dumps([_WORDS * 4], ensure_ascii=False),
    ),
    "500 choices": (choice_grammar([f"the answer {i}" for i in range(500)]), "the answer 417"),
    "regex": (regex_grammar(r"(\d{4}-\d{2}-\d{2}( |\n)){1,9}"), "2024-02-29 " * 8),
}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    vocab_size = json.loads((args.model / "config.json").read_text()).get("vocab_size", tokenizer.size)
    guides = Guides(args.model, vocab_size)
    before_bytes, began_s = psutil.Process().memory_info().rss, time.perf_counter()
    guides.open(choice_grammar(["a"])).allowed([])
    grown = (psutil.Process().memory_info().rss - before_bytes) / 1e6
    print(f"vocabulary of {vocab_size}: {time.perf_counter() - began_s:.2f} s, {grown:.0f} MB")
    print("grammar        tokens  compile ms  draw ms: with  without  mask: mean    p99  worst")
    for name, (grammar, text) in CASES.items():
        tokens = tokenizer.encode(text, add_special_tokens=False)
        print(f"{name:13}  {_measure(guides, vocab_size, grammar, tokens, args.rounds)}")


def _measure(guides: Guides, vocab_size: int, grammar: str, tokens: list[int], rounds: int) -> str:
    spec = ring_pb2.Sampling(temperature=1.0, seed=1)
    logits = mx.random.normal((vocab_size,))
    compile_ms, masks, draws = [], [], {True: [0.0], False: [0.0]}
    for _ in range(rounds):
        began_s = time.perf_counter()
        guide = guides.open(grammar)
        guide.allowed([])
        compile_ms.append((time.perf_counter() - began_s) * 1e3)
        timed = _Timed(guide)
        for sampler in (Sampler(spec, vocab_size, timed), Sampler(spec, vocab_size)):  # type: ignore[arg-type]
            spent = _follow(sampler, logits, tokens)
            draws[sampler._guide is not None].append(statistics.mean(spent))
        masks += timed.spent_ms
    masks.sort()
    with_ms, without_ms = (statistics.median(draws[is_guided][1:]) for is_guided in (True, False))
    return (
        f"{len(tokens):6}  {statistics.median(compile_ms):10.2f}  {with_ms:13.3f}  {without_ms:7.3f}"
        f"  {statistics.mean(masks):10.3f}  {masks[int(len(masks) * 0.99)]:5.2f}  {masks[-1]:5.2f}"
    )


def _follow(sampler: Sampler, logits: mx.array, tokens: list[int]) -> list[float]:
    """CPU ms of each draw along the text, whatever was drawn."""
    spent = []
    for place in range(len(tokens)):
        began_s = time.process_time()
        draw = sampler.draw(logits, place, tokens[:place], 0)
        mx.eval(draw.arrays())
        draw.finish()
        spent.append((time.process_time() - began_s) * 1e3)
    return spent


class _Timed:
    """A guide that notes what it costs the thread that asks it."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self.spent_ms: list[float] = []

    def allowed(self, answer: list[int]) -> Any:
        began_s = time.thread_time()
        found = self._guide.allowed(answer)
        self.spent_ms.append((time.thread_time() - began_s) * 1e3)
        return found


if __name__ == "__main__":
    main()
