"""Whether two models read and write the same token ids, from their tokenizers' files alone. Any thread.

What a draft model guesses are ids of the other model, so an id has to be the same piece of text in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shard_loader.sources import HubError

# Where there is no tokenizer.json: the files of other tokenizers that hold a vocabulary.
_OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "*.tiktoken")


def vocabulary(folder: Path) -> dict[str, int]:
    """Piece -> id of tokenizer.json, without the tokens that were added to it. Raises HubError.

    Those are named anew by every fine-tune (`<|reserved_3|>`), and are few.
    """
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pieces: Any = content["model"]["vocab"]
        added = {token["content"] for token in content.get("added_tokens") or ()}
        if isinstance(pieces, dict):
            found = {str(piece): int(number) for piece, number in pieces.items()}
        else:  # Unigram: pairs of piece and score, in the order of the ids
            found = {str(piece): number for number, (piece, _) in enumerate(pieces)}
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{path} is no tokenizer of Hugging Face's library") from error
    return {piece: number for piece, number in found.items() if piece not in added}


def difference(folder: Path, other: Path) -> str:
    """What differs between the vocabularies of two model folders, in words; empty where nothing does.

    Raises HubError where one of them has no vocabulary.
    """
    if not all((place / "tokenizer.json").is_file() for place in (folder, other)):
        return _difference_of_files(folder, other)
    first, second = vocabulary(folder), vocabulary(other)
    if first == second:
        return ""
    if len(first) != len(second):
        return f"one has {len(second)} tokens, the other {len(first)}"
    by_id = {number: piece for piece, number in second.items()}
    number, piece = min((number, piece) for piece, number in first.items() if second.get(piece) != number)
    return f"token {number} is {by_id.get(number)!r} in one and {piece!r} in the other"


def _difference_of_files(folder: Path, other: Path) -> str:
    first, second = (
        {path.name: path.read_bytes() for pattern in _OTHERS for path in place.glob(pattern)}
        for place in (folder, other)
    )
    for place, files in ((folder, first), (other, second)):
        if not files and not (place / "tokenizer.json").is_file():
            raise HubError(f"{place} has no tokenizer.json and no other vocabulary")
    common = sorted(first.keys() & second.keys())
    if not common:
        return "their tokenizers are of different kinds"
    changed = next((name for name in common if first[name] != second[name]), None)
    return "" if changed is None else f"their files {changed} differ"
