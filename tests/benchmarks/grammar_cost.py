"""What holding an answer to a grammar costs the last stage: CPU milliseconds per token.

    python -m tests.benchmarks.grammar_cost [--model FOLDER] [--rounds 5]

FOLDER needs no weights, only a tokenizer and config.json; the demo model's has 4096 tokens. Each grammar is
followed along a text of its own, token by token, with random logits: with the guide and without, in turn. All
is CPU time in ms:

compile  once for an answer, on a thread beside, while its prompt is read
draw     a whole draw, all threads: with the guide, and without
mask     the guide's part of a draw: the mean, the 99th percentile, the worst. It is made while the token
         before goes round the ring: an answer is later by it only where its last stage never waits

The first answer of all waits for the view of the vocabulary too, whose time and memory come first; then those
of the process in which a stage has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx
import psutil

from cluster.grammar import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar
from cluster.guide import Guide, Guides
from cluster.guide_process import GuideProcess
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
    before_bytes, began_s = psutil.Process().memory_info().rss, time.process_time()
    guides.open(choice_grammar(["a"])).allowed([])
    grown = (psutil.Process().memory_info().rss - before_bytes) / 1e6
    print(f"vocabulary of {vocab_size}: {time.process_time() - began_s:.2f} s, {grown:.0f} MB")
    print(_in_a_process(args.model, vocab_size))
    print("grammar        tokens  compile  draw: with  without  mask: mean   p99  worst")
    for name, (grammar, text) in CASES.items():
        tokens = tokenizer.encode(text, add_special_tokens=False)
        print(f"{name:13}  {_measure(guides, vocab_size, grammar, tokens, args.rounds)}")


def _in_a_process(model: Path, vocab_size: int) -> str:
    """What it is as stages do it: the process's memory, and a mask that was not expected."""
    guides = GuideProcess(model, vocab_size)
    guide = guides.open(json_object_grammar())
    guide.allowed([])
    child = psutil.Process(guide._child.process.pid)
    first, waits_ms = vocab_size // 2, []
    for place in range(200):
        began_s = time.perf_counter()
        guide.allowed([first] if place % 2 else [])
        waits_ms.append((time.perf_counter() - began_s) * 1e3)
    memory = child.memory_full_info()
    size = f"{memory.rss / 1e6:.0f} MB, {memory.uss / 1e6:.0f} MB of them its own"
    guides.close()
    return f"in a process beside: {size}, {statistics.median(waits_ms):.2f} ms for a mask at once"


def _measure(guides: Guides, vocab_size: int, grammar: str, tokens: list[int], rounds: int) -> str:
    spec = ring_pb2.Sampling(temperature=1.0, seed=1)
    logits = mx.random.normal((vocab_size,))
    compiles, masks, guided, plain = [], [], [], []
    for _ in range(rounds):
        began_s = time.process_time()
        guide = guides.open(grammar)
        guide.allowed([])
        compiles.append((time.process_time() - began_s) * 1e3)
        guided.append(_follow(Sampler(spec, vocab_size, guide), logits, tokens, guides))
        plain.append(_follow(Sampler(spec, vocab_size), logits, tokens, guides))
        masks += _masks_ms(guides.open(grammar), tokens)
    masks.sort()
    return (
        f"{len(tokens):6}  {statistics.median(compiles):7.2f}  {statistics.median(guided):10.3f}"
        f"  {statistics.median(plain):7.3f}  {statistics.mean(masks):10.3f}"
        f"  {masks[int(len(masks) * 0.99)]:4.2f}  {masks[-1]:5.2f}"
    )


def _follow(sampler: Sampler, logits: mx.array, tokens: list[int], guides: Guides) -> float:
    """Mean CPU ms of the draws along the text, as if its tokens were drawn."""
    began_s = time.process_time()
    for place, token in enumerate(tokens):
        draw = sampler.draw(logits, place, tokens[:place], 0)
        mx.eval(draw.arrays())
        if draw.on_token is not None:
            draw.on_token(token)
            guides.prepare()
    return (time.process_time() - began_s) / len(tokens) * 1e3


def _masks_ms(guide: Guide, tokens: list[int]) -> list[float]:
    """CPU of each mask along the text."""
    spent_ms = []
    for place in range(len(tokens)):
        began_s = time.thread_time()
        guide.allowed(tokens[:place])
        spent_ms.append((time.thread_time() - began_s) * 1e3)
    return spent_ms


if __name__ == "__main__":
    main()
