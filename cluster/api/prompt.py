"""Prompts of a request, checked, as token ids, and what fits the context. Pure; may run in any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.api.errors import ApiError, bad_request
from cluster.api.parts import PartReader
from cluster.api.schema import CompletionBody
from cluster.tokenizer import Tokenizer

MAX_ANSWERS = 64  # of one request
COUNTED_CHARS = 2_000_000  # up to here a refusal gives the exact number of tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """What the ring serves."""

    context: int  # tokens of prompt and answer together; 0: the head has no plan yet
    vocab_size: int
    max_active: int = 0  # answers at once
    max_queued: int = 0  # answers that may wait for these


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    echo: str = ""  # the prompt's text, where the answer shall begin with it
    make_reader: Callable[[], PartReader] | None = None  # of its answers, where they are more than content
    shown_ids: frozenset[int] = frozenset()  # special tokens that the reader must see
    grammar: str = ""  # which its answers must keep to
    grammar_field: str = ""  # of the request, which asks for that


def read_prompts(body: CompletionBody, tokenizer: Tokenizer, limits: Limits) -> list[Prompt]:
    """`prompt` as a text, a list of texts, a list of ids, or a list of those; raises ApiError."""
    given = body.prompt
    if given is None:
        raise bad_request("prompt is missing.", "prompt", "missing_parameter")
    if isinstance(given, str) or (isinstance(given, list) and given and is_id(given[0])):
        given = [given]
    if not isinstance(given, list):
        raise bad_request("prompt must be a text, a list of texts, or token ids.", "prompt", "invalid_value")
    if not given:
        raise bad_request("prompt is empty.", "prompt", "empty_prompt")
    if len(given) * (body.n or 1) > MAX_ANSWERS:
        raise bad_request(
            f"prompt: {len(given)} prompts with n = {body.n or 1} make more than {MAX_ANSWERS} answers; "
            "send several requests.",
            "prompt",
        )
    add_special_tokens = body.add_special_tokens is not False
    prompts = []
    for item in given:
        if isinstance(item, str):
            tokens = _encode(item, tokenizer, limits, add_special_tokens)
        elif isinstance(item, list):
            tokens = _check_prompt(item, limits)
        else:
            raise bad_request(
                "prompt must be a text, a list of texts, or token ids.", "prompt", "invalid_value"
            )
        echo = (item if isinstance(item, str) else tokenizer.decode(tokens)) if body.echo else ""
        prompts.append(Prompt(tokens, echo))
    return prompts


def check_answers(num_prompts: int, n: int, limits: Limits) -> None:
    """Raises ApiError for more answers than the ring runs and queues together: they would never all start."""
    room = limits.max_active + limits.max_queued
    if num_prompts * n <= room:
        return
    holds = f"this ring runs {limits.max_active} at once and queues {limits.max_queued}"
    if num_prompts == 1:
        raise bad_request(f"n is {n}, but {holds}: n can be {room} at most.", "n", "invalid_value")
    asked = f"{num_prompts} prompts with n = {n} make {num_prompts * n} answers, but {holds}"
    if n > 1 and num_prompts <= room:
        raise bad_request(f"{asked}: n can be {room // num_prompts} at most.", "n", "invalid_value")
    raise bad_request(f"prompt: {asked}; send several requests.", "prompt", "invalid_value")


def _encode(text: str, tokenizer: Tokenizer, limits: Limits, add_special_tokens: bool) -> list[int]:
    refuse_long_text(len(text), tokenizer, limits, "prompt")
    tokens = tokenizer.encode(text, add_special_tokens=add_special_tokens) if text else []
    if not tokens:
        raise bad_request("prompt is empty.", "prompt", "empty_prompt")
    return tokens


def _check_prompt(tokens: list[Any], limits: Limits) -> list[int]:
    if not tokens:
        raise bad_request("prompt is empty.", "prompt", "empty_prompt")
    if limits.context and len(tokens) >= limits.context:
        raise too_long(limits.context, len(tokens), None, "prompt")
    return check_ids(tokens, limits, "prompt")


def check_ids(tokens: list[Any], limits: Limits, place: str) -> list[int]:
    """A list that says it is of token ids; raises ApiError where it is not."""
    size = limits.vocab_size
    for i, token in enumerate(tokens):
        if not is_id(token):
            raise bad_request(
                f"{place}: element {i} is not a token id (a whole number).", place, "invalid_value"
            )
        if not 0 <= token < size:
            raise bad_request(
                f"{place}: the token id {token} is not in the vocabulary (0 to {size - 1}).",
                place,
                "invalid_value",
            )
    return tokens


def is_id(value: Any) -> bool:
    """Whether it may be a token's."""
    return isinstance(value, int) and not isinstance(value, bool)


def refuse_long_text(num_chars: int, tokenizer: Tokenizer, limits: Limits, place: str) -> None:
    """Spares the tokenizer a huge text that cannot fit, even in the vocabulary's longest tokens."""
    at_least = num_chars // max(tokenizer.max_token_chars, 1)
    if num_chars > COUNTED_CHARS and limits.context and at_least > 4 * limits.context:
        raise too_long(limits.context, at_least, None, place, is_estimate=True)


def too_long(
    context: int, num_prompt: int, num_answer: int | None, place: str, *, is_estimate: bool = False
) -> ApiError:
    """The refusal of a request that does not fit the context, with its numbers."""
    about = "at least " if is_estimate else ""
    if num_answer is None:
        asked = f"there are {about}{num_prompt} tokens in your {place}"
        cure = f"Please shorten the {place} to less than {context} tokens."
    else:
        asked = (
            f"you requested {num_prompt + num_answer} tokens "
            f"({num_prompt} in the {place}, {num_answer} in the completion)"
        )
        cure = f"Please reduce the length of the {place} or of the completion."
    return bad_request(
        f"This model's maximum context length is {context} tokens. However, {asked}. {cure}",
        place,
        "context_length_exceeded",
    )


def answer_tokens(
    asked: int | None, default: int | None, prompt: Sequence[int], limits: Limits, place: str
) -> int:
    """max_tokens of one answer: what was asked for, else the default, else the rest of the context."""
    room = limits.context - len(prompt)
    if room <= 0:
        raise too_long(limits.context, len(prompt), None if asked is None else asked, place)
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise too_long(limits.context, len(prompt), asked, place)
    return asked
