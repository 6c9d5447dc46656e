"""Where a model's reasoning begins and ends, by its vocabulary, as mlx-lm finds it. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """The texts around reasoning."""

    start: str
    end: str
    is_anywhere: bool = False  # else only before the answer's first word: later it is a word like any other


# mlx_lm/tokenizer_utils.py, _infer_thinking; [THINK] is Mistral's (docs.mistral.ai, Magistral).
_PAIRS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("[THINK]", "[/THINK]"),
)
_GEMMA4 = ThinkMarkers("<|channel>thought", "<channel|>", is_anywhere=True)
_KIMI_K3 = ThinkMarkers("<|open|>think<|sep|>", "<|close|>think<|sep|>", is_anywhere=True)
XTML_TOKENS = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")


def find_think_markers(vocab: Container[str]) -> ThinkMarkers | None:
    """The markers of a model with this vocabulary; None if it does not reason."""
    for start, end in _PAIRS:
        if start in vocab and end in vocab:
            return ThinkMarkers(start, end)
    if "<|channel>" in vocab and "<channel|>" in vocab:
        return _GEMMA4
    if all(token in vocab for token in XTML_TOKENS):
        return _KIMI_K3
    return None


def has_begun(markers: ThinkMarkers, end: str, *, is_continued: bool = False) -> bool:
    """Whether what follows a text with this end is reasoning.

    The text is a prompt's, or with `is_continued` an answer's, in which what was opened last decides.
    """
    if is_continued:
        return end.rfind(markers.start) > end.rfind(markers.end)
    return end.rstrip().endswith(markers.start)
