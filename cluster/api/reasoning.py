"""Where a model's reasoning begins and ends, by its vocabulary, as mlx-lm finds it. Pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

TAIL_TOKENS = 16  # of a prompt, where a template may have begun the reasoning


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


def has_begun(markers: ThinkMarkers, prompt_end: str, *, is_continued: bool = False) -> bool:
    """Whether an answer that follows a prompt with this end is reasoning from its first token.

    With `is_continued` the answer's beginning is part of the prompt, so that what opened last decides.
    """
    if is_continued:
        return prompt_end.rfind(markers.start) > prompt_end.rfind(markers.end)
    return prompt_end.rstrip().endswith(markers.start)


def tail(tokens: Sequence[int]) -> Sequence[int]:
    """The tokens of a prompt that `has_begun` needs the text of."""
    return tokens[-TAIL_TOKENS:]
