"""What the bench's users ask: lengths, seeds, and held-out text from the start of a line."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cluster.errors import EXIT_USAGE, UserError
from deploy.bench_prompts import TOKENIZER, prompts
from deploy.demo.corpus import is_held_out

VOCAB_SIZE = 4096


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Ten files; those kept from training say so in each line."""
    names = [f"module_{i}.py" for i in range(200)]
    wanted = [name for name in names if is_held_out(name)][:5]
    for name in [*wanted, *(name for name in names if not is_held_out(name))][:10]:
        word = "held" if is_held_out(name) else "known"
        (tmp_path / name).write_text("".join(f"{word} = {i}  # {name}\n" for i in range(30)))
    return tmp_path


def test_random_prompts_are_seeded_ids_of_the_vocabulary() -> None:
    first = list(islice(prompts("random", 100, 7, 3), 50))
    assert {len(prompt) for prompt in first} == {7}
    assert {token for prompt in first for token in prompt} <= set(range(1, 100))
    assert first == list(islice(prompts("random", 100, 7, 3), 50))
    assert first != list(islice(prompts("random", 100, 7, 4), 50))
    assert len(set(map(tuple, first))) == 50


def test_demo_prompts_are_held_out_text_from_the_start_of_a_line(library: Path) -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    first = list(islice(prompts("demo", VOCAB_SIZE, 24, 0, library), 20))
    assert {len(prompt) for prompt in first} == {24}
    for prompt in first:
        text = tokenizer.decode(prompt)
        assert text.startswith("held = ")
        assert "known" not in text
    assert first == list(islice(prompts("demo", VOCAB_SIZE, 24, 0, library), 20))
    assert first != list(islice(prompts("demo", VOCAB_SIZE, 24, 1, library), 20))


@pytest.mark.parametrize(
    ("vocab_size", "length", "has_files", "message"),
    [
        (
            151936,
            8,
            True,
            r"is text in the 4096 tokens of the demo model, and the model of this ring has 151936: use "
            r"--dataset random",
        ),
        (
            VOCAB_SIZE,
            8,
            False,
            r"reads Python's standard library, and .* has no sources: use --dataset random",
        ),
        (VOCAB_SIZE, 10**6, True, r"has \d+ tokens, fewer than --prompt-tokens 1000000: ask for less"),
    ],
)
def test_refusals_of_the_demo_text(
    library: Path, vocab_size: int, length: int, has_files: bool, message: str
) -> None:
    if not has_files:
        for file in library.iterdir():
            file.unlink()
    with pytest.raises(UserError, match=message) as refused:
        prompts("demo", vocab_size, length, 0, library)
    assert refused.value.exit_code == EXIT_USAGE
