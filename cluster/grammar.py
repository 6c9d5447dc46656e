"""What an answer must look like, as one text: JSON Schemas, regular expressions and choices for llguidance.

The HTTP process writes and checks the text, the last stage (`cluster.guide`) holds its answers to it. Pure.
The text is JSON with one or more grammars (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MAX_GRAMMAR_BYTES = 256 << 10  # it crosses every edge of the ring, in the header of one frame
# The library goes down a schema recursively, through references too, and has no limit of its own there: at
# about 2000 levels it overruns a stack of 8 MiB, and the process is gone.
MAX_LEVELS = 1000
_STACK_BYTES = 32 << 20
# No whitespace, a space, or new lines and an indentation: a weak model may not write blanks for ever.
WHITESPACE = r"( |\n{1,2}[ \t]{0,20})?"
MAX_REASON_CHARS = 500
# The id of an added token by its name, or None. To the library most of these are no text, special or not.
TokenOf = Callable[[str], int | None]
_TOKEN_LIKE = re.compile(r"(<[^<>\s]+>|\[[A-Z_/]+\])")


class GrammarError(ValueError):
    """The schema or expression cannot be followed; the message says why."""


def json_schema_grammar(schema: Any) -> str:
    """For JSON that is valid under `schema`; raises GrammarError for what is no schema at all."""
    return grammars_text([{"json_schema": with_whitespace(schema)}])


def json_object_grammar() -> str:
    """For any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(regex: str) -> str:
    """For a text that matches `regex` as a whole (https://docs.rs/regex/latest/regex/#syntax)."""
    from llguidance import LLMatcher  # here and below: few requests need it

    return LLMatcher.grammar_from_regex(regex)


def choice_grammar(choices: Sequence[str]) -> str:
    """For one of these texts."""
    return grammars_text([{"lark_grammar": "start: " + " | ".join(map(quoted, choices))}])


def either(grammar: str, other: str) -> str:
    """For an answer of the one or of the other, whose parts have no names in common."""
    parts = []
    for name, text in (("one", grammar), ("other", other)):
        first, *more = json.loads(text)["grammars"]
        parts += [{**first, "name": name}, *more]
    return grammars_text([{"lark_grammar": "start: @one | @other"}, *parts])


def after_text(grammar: str, text: str, token_of: TokenOf) -> str:
    """The same, after `text`."""
    return _after(grammar, [f"start: {lark(text, token_of)}"])


def after_thinking(grammar: str, start: str, end: str, *, token_of: TokenOf, is_open: bool) -> str:
    """The same, after any text between `start` and `end`, or none; with `is_open` the prompt has `start`."""
    thoughts = "thoughts" if is_open else f"({lark(start, token_of)} thoughts)?"
    rules = [r"thoughts: thought /\n{0,2}/", any_text("thought", end, token_of)]
    return _after(grammar, [f"start: {thoughts}", *rules])


def _after(grammar: str, rules: list[str]) -> str:
    """The same, after what `rules` say, of which the first is the start."""
    first, *others = json.loads(grammar)["grammars"]
    name = f"part{len(others)}"  # no other has it: there are more of them with each
    start, *more = rules
    lark_text = "\n".join([f"{start} @{name}", *more])
    return grammars_text([{"lark_grammar": lark_text}, {**first, "name": name}, *others])


def lark(text: str, token_of: TokenOf) -> str:
    """`text` as a Lark expression: added tokens by their ids, since no text can stand for them."""
    pieces = [piece for piece in _TOKEN_LIKE.split(text) if piece]
    return " ".join(
        quoted(piece) if token_of(piece) is None else f"<[{token_of(piece)}]>" for piece in pieces
    )


def any_text(rule: str, end: str, token_of: TokenOf) -> str:
    """A Lark rule for whatever comes before the next `end`, and that."""
    pieces = [piece for piece in _TOKEN_LIKE.split(end) if piece]
    if token_of(pieces[0]) is not None:
        return f"{rule}: /(?s:.*)/ {lark(end, token_of)}"
    for place, piece in enumerate(pieces):
        if token_of(piece) is not None:
            head, tail = "".join(pieces[:place]), "".join(pieces[place:])
            return (
                f"{rule}: {rule}_text {lark(tail, token_of)}\n{rule}_text[suffix={quoted(head)}]: /(?s:.*)/"
            )
    return f"{rule}[suffix={quoted(end)}]: /(?s:.*)/"


def quoted(text: str) -> str:
    """A Lark string, which is a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def grammars_text(grammars: Sequence[dict[str, Any]]) -> str:
    """Several grammars: the first is the answer's, and may use the others by their names, as @name."""
    try:
        return json.dumps({"grammars": list(grammars)}, ensure_ascii=False)
    except RecursionError:
        raise _too_deep() from None


def with_whitespace(schema: Any) -> Any:
    """`schema` with our bound on whitespace, unless it sets its own; raises GrammarError."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise GrammarError("a schema must be an object")
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        raise GrammarError("x-guidance must be an object")
    if own.get("whitespace_flexible") is False:
        return schema
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, **own}}


def check_grammar(grammar: str) -> None:
    """Raises GrammarError with the library's reason for a grammar that cannot be followed.

    Milliseconds, but up to seconds for very large ones. Call it on a thread of `deep_pool`.
    """
    from llguidance import LLMatcher, LLTokenizer

    check_size(grammar)
    is_error, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise GrammarError(one_line(reasons[0]))
    if "<[" not in grammar:  # else it is about tokens that only the model has
        matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError("no text begins as it says")


def check_size(grammar: str) -> None:
    """Raises GrammarError for a text that is too long, or so deep that the library would crash."""
    num_bytes = len(grammar.encode())
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"it takes {num_bytes} bytes, and {MAX_GRAMMAR_BYTES} are allowed")
    try:
        parts = json.loads(grammar)["grammars"]
        num_levels = sum(_num_levels(part.get("json_schema")) for part in parts)
    except RecursionError:
        raise _too_deep() from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise GrammarError(f"it is no list of grammars: {error}") from None
    if num_levels > MAX_LEVELS:
        raise _too_deep()


def deep_pool() -> ThreadPoolExecutor:
    """One thread, with a stack for several times MAX_LEVELS."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
    usual_bytes = threading.stack_size(_STACK_BYTES)
    try:
        pool.submit(lambda: None).result()  # the thread starts here
    finally:
        threading.stack_size(usual_bytes)
    return pool


def one_line(reason: str) -> str:
    """The library's reason as part of a sentence."""
    return " ".join(reason.split())[:MAX_REASON_CHARS]


def _num_levels(schema: Any) -> int:
    """How deep it is, and each part that a reference names: one path may lead through them all."""
    depths: dict[int, int] = {}
    whole = _measure(schema, depths)
    # What is no pointer into it, or names nothing, counts as the whole.
    named = (find_part(schema, name) for name in set(_references(schema)))
    return whole + sum(depths.get(id(part), whole) for part in named)


def _measure(value: Any, depths: dict[int, int]) -> int:
    """Levels of objects and lists; all of them, by id, in `depths`."""
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    depths[id(value)] = 1 + max([_measure(part, depths) for part in inner], default=0)
    return depths[id(value)]


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _references(part)


def find_part(schema: Any, pointer: str) -> Any:
    """What a pointer (RFC 6901) names; None if nothing."""
    for step in pointer.removeprefix("#/").split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(name)
        elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema


def _too_deep() -> GrammarError:
    return GrammarError(
        f"it is nested too deep, counting what its references name: {MAX_LEVELS} levels at most"
    )
