"""Whether a draft model reads the tokens of the big one: by the vocabularies in their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shard_loader.sources import HubError
from shard_loader.vocabulary import difference, vocabulary


def folder(place: Path, vocab: Any, *, added: tuple[str, ...] = ()) -> Path:
    place.mkdir()
    tokens = [{"id": len(vocab) + i, "content": text} for i, text in enumerate(added)]
    content = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": tokens}
    (place / "tokenizer.json").write_text(json.dumps(content))
    return place


WORDS = {"a": 0, "b": 1, "c": 2}


def test_the_same_words_with_the_same_ids_are_no_difference(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", WORDS, added=("<|end|>",))
    other = folder(tmp_path / "other", dict(reversed(WORDS.items())), added=("<|end|>", "<|reserved_7|>"))
    assert vocabulary(one) == WORDS
    assert difference(one, other) == ""


def test_a_special_token_that_stands_in_the_vocabulary_is_still_an_added_one(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", WORDS | {"<|x|>": 3}, added=("<|x|>",))
    other = folder(tmp_path / "other", WORDS | {"<|y|>": 3}, added=("<|y|>",))
    assert difference(one, other) == ""


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"a": 0, "b": 1}, "one has 2 tokens, the other 3"),
        ({"a": 0, "b": 2, "c": 1}, "token 1 is 'c' in one and 'b' in the other"),
        ({"a": 0, "b": 1, "d": 2}, "token 2 is 'd' in one and 'c' in the other"),
        ([["a", 0.0], ["b", -1.0]], "one has 2 tokens, the other 3"),
    ],
)
def test_differences_are_named(tmp_path: Path, other: Any, told: str) -> None:
    one = folder(tmp_path / "one", WORDS)
    assert difference(one, folder(tmp_path / "other", other)) == told


def test_unigram_vocabularies_are_lists(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", [["a", 0.0], ["b", -1.0], ["c", -2.5]])
    assert vocabulary(one) == WORDS
    assert difference(one, folder(tmp_path / "other", WORDS)) == ""


def test_other_tokenizers_are_compared_byte_by_byte(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        place.mkdir()
        (place / "tokenizer.model").write_bytes(b"pieces")
    assert difference(one, other) == ""
    (other / "tokenizer.model").write_bytes(b"others")
    assert difference(one, other) == "their files tokenizer.model differ"
    (other / "tokenizer.model").rename(other / "x.tiktoken")
    assert difference(one, other) == "their tokenizers are of different kinds"


def test_a_folder_without_a_vocabulary_is_told(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", WORDS)
    (tmp_path / "none").mkdir()
    with pytest.raises(HubError, match=r"none has no tokenizer\.json and no other vocabulary"):
        difference(one, tmp_path / "none")
    (tmp_path / "none" / "tokenizer.json").write_text("[]")
    with pytest.raises(HubError, match=r"tokenizer\.json is no tokenizer of Hugging Face's library"):
        difference(one, tmp_path / "none")
