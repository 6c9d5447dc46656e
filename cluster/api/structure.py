"""What a request says about the form of its answer, as a grammar: response_format, and vLLM's fields.

The text is made here, and compiled once, so that a bad schema is refused before anything runs.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.api.errors import ApiError, bad_request
from cluster.api.schema import GenerateBody
from cluster.grammar import (
    GrammarError,
    check_grammar,
    choice_grammar,
    deep_pool,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)

# vLLM's older names of what structured_outputs holds
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")


class GrammarChecker:
    """Compiles grammars on a thread of its own, which starts with the first of them."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    async def check(self, grammar: str, param: str) -> None:
        """Raises ApiError 400 with the reason, for a grammar that cannot be followed; "" is none."""
        if not grammar:
            return
        if self._pool is None:
            self._pool = deep_pool()
        try:
            await asyncio.wrap_future(self._pool.submit(check_grammar, grammar))
        except GrammarError as error:
            raise refused(param, error) from None


def read_structure(body: GenerateBody) -> tuple[str, str]:
    """The grammar that the answer must keep to, and the field that says so; two empty texts: none.

    Raises ApiError naming the field.
    """
    found = [
        (name, value)
        for name in ("response_format", "structured_outputs", *_GUIDED)
        if (value := getattr(body, name)) is not None
    ]
    found = [(name, value) for name, value in found if (name, value) != ("response_format", {"type": "text"})]
    if not found:
        return "", ""
    if len(found) > 1:
        raise bad_request(
            f"{found[0][0]} and {found[1][0]} exclude each other.", found[1][0], "invalid_value"
        )
    name, value = found[0]
    try:
        if name == "response_format":
            return _response_format(value), name
        if name == "structured_outputs":
            return _structured(value), name
        return _of_kind(_GUIDED[name], value), name
    except GrammarError as error:
        raise refused(name, error) from None


def _response_format(value: Any) -> str:
    """OpenAI's: {"type": "json_object"}, or "json_schema" with a schema."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "json_object":
        _no_others("response_format", value, ("type",))
        return json_object_grammar()
    if kind != "json_schema":
        raise bad_request(
            'response_format.type must be "text", "json_object" or "json_schema".',
            "response_format",
            "invalid_value",
        )
    _no_others("response_format", value, ("type", "json_schema"))
    place = "response_format.json_schema"
    inner = value.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise bad_request(f"{place} must be an object with a name and a schema.", place, "invalid_value")
    _no_others(place, inner, _SCHEMA_FIELDS)
    return json_schema_grammar(inner["schema"])


def _structured(value: Any) -> str:
    """vLLM's: an object with one of json, json_object, regex and choice."""
    given = {name: v for name, v in value.items() if v is not None} if isinstance(value, dict) else {}
    kinds = (*_GUIDED.values(), "json_object")
    if len(given) != 1 or not given.keys() <= set(kinds):
        raise bad_request(
            f"structured_outputs must be an object with one of {', '.join(kinds)}.",
            "structured_outputs",
            "invalid_value",
        )
    return _of_kind(*given.popitem())


def _of_kind(kind: str, value: Any) -> str:
    if kind == "json_object":
        if value is not True:
            raise GrammarError("json_object must be true")
        return json_object_grammar()
    if kind == "json":
        try:
            return json_schema_grammar(json.loads(value) if isinstance(value, str) else value)
        except (ValueError, RecursionError) as error:
            raise GrammarError(str(error)) from None
    if kind == "regex":
        if not isinstance(value, str):
            raise GrammarError("a regular expression must be a text")
        return regex_grammar(value)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise GrammarError("the choices must be a list of texts, none of them empty")
    return choice_grammar(value)


def _no_others(place: str, value: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in value:
        if name not in known:
            raise bad_request(
                f"{place}.{str(name)[:60]} is not a field of this request.", place, "unknown_parameter"
            )


def refused(param: str, error: GrammarError) -> ApiError:
    """The error of a request whose grammar, by the field `param`, cannot be followed."""
    return bad_request(f"{param} cannot be followed: {error}.", param, "invalid_grammar")
