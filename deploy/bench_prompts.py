"""The prompts of `macrame bench`, as token ids of one length: random ones, or text like the demo model's."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from cluster.errors import EXIT_USAGE, UserError
from deploy.demo.corpus import END_OF_TEXT_ID, is_held_out, read_sources

DATASETS = ("random", "demo")
TOKENIZER = Path(__file__).parent / "demo" / "model" / "tokenizer.json"


def prompts(
    dataset: str, vocab_size: int, length: int, seed: int, library: Path | None = None
) -> Iterator[list[int]]:
    """Prompts without end, the same for the same seed, each of `length` tokens.

    "demo": of the files of this Python's standard library (or of `library`) that the demo model was not
    trained on, from the start of a line. Raises UserError where these are not to be had.
    """
    draw = random.Random(seed)
    if dataset == "random":
        size = max(2, vocab_size)
        return ([draw.randrange(1, size) for _ in range(length)] for _ in iter(int, 1))
    return _windows(_held_out(vocab_size, library), length, draw)


def _held_out(vocab_size: int, library: Path | None) -> tuple[list[int], list[int]]:
    """All held-out tokens one after another, and where lines start in them."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    own_size = tokenizer.get_vocab_size()
    if vocab_size != own_size:
        raise UserError(
            f"--dataset demo is text in the {own_size} tokens of the demo model, and the model of this ring "
            f"has {vocab_size}: use --dataset random, or a ring of the demo model",
            EXIT_USAGE,
        )
    root = library or Path(sysconfig.get_paths()["stdlib"])
    texts = read_sources(root, is_held_out).values()
    if not texts:
        raise UserError(
            f"--dataset demo reads Python's standard library, and {root} has no sources: use --dataset "
            "random",
            EXIT_USAGE,
        )
    files = ((*encoded.ids, END_OF_TEXT_ID) for encoded in tokenizer.encode_batch(list(texts)))
    tokens = list(chain.from_iterable(files))
    ends = {tokenizer.token_to_id("\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"), END_OF_TEXT_ID}
    return tokens, [0, *(i for i, token in enumerate(tokens, 1) if token in ends)]


def _windows(text: tuple[list[int], list[int]], length: int, draw: random.Random) -> Iterator[list[int]]:
    tokens, starts = text
    starts = [start for start in starts if start + length <= len(tokens)]
    if not starts:
        raise UserError(
            f"--dataset demo has {len(tokens)} tokens, fewer than --prompt-tokens {length}: ask for less",
            EXIT_USAGE,
        )
    return (tokens[start : start + length] for start in iter(lambda: draw.choice(starts), -1))
