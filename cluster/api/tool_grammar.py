"""Grammars of tool calls, where a request says that there must be one: in each model family's notation. Pure.

The notations are those that mlx-lm's parsers of the same names read (mlx_lm/tool_parsers), written as the
families' own chat templates write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.grammar import (
    GrammarError,
    TokenOf,
    any_text,
    find_part,
    grammars_text,
    lark,
    quoted,
    with_whitespace,
)

_JSON_TYPES = ("integer", "number", "boolean", "object", "array", "null")
_DEFINITIONS = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """Calls whose arguments are one JSON object. In `before`, NAME stands for the function's."""

    before: str
    after: str
    begin: str = ""
    between: str | None = ""  # None: there can be only one call
    end: str = ""
    number: str = ""  # the regular expression of what stands between `before` and `head`
    head: str = ""


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Calls with a tag for each argument. NAME and KEY stand for names, of function and argument."""

    before: str
    value: str
    value_end: str
    after: str
    begin: str = ""
    between: str | None = ""
    end: str = ""
    is_text: bool = True  # a value whose schema names no type is text as it is, not JSON


_HERMES = JsonCalls('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", between="\n")
_GLM = TaggedCalls(
    "<tool_call>NAME\n",
    "<arg_key>KEY</arg_key>\n<arg_value>",
    "</arg_value>\n",
    "</tool_call>",
    between="\n",
    is_text=False,
)
NOTATIONS: Mapping[str, JsonCalls | TaggedCalls] = {
    "json_tools": _HERMES,
    "mistral": JsonCalls("[TOOL_CALLS]NAME[ARGS]", ""),
    "kimi_k2": JsonCalls(
        "<|tool_call_begin|>functions.NAME:",
        "<|tool_call_end|>",
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        number="[0-9]{1,3}",
        head="<|tool_call_argument_begin|>",
    ),
    "deepseek": JsonCalls(
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    "harmony": JsonCalls(
        "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>", "", between=None
    ),
    "llama": JsonCalls('{"name": "NAME", "parameters": ', "}", between=None),
    "qwen3_coder": TaggedCalls(
        "<tool_call>\n<function=NAME>\n",
        "<parameter=KEY>\n",
        "\n</parameter>\n",
        "</function>\n</tool_call>",
        between="\n",
    ),
    "glm47": _GLM,
    "laguna": _GLM,
    "minimax_m2": TaggedCalls(
        '<invoke name="NAME">\n',
        '<parameter name="KEY">',
        "</parameter>\n",
        "</invoke>\n",
        begin="<minimax:tool_call>\n",
        end="</minimax:tool_call>",
    ),
}


def grammar_for_tools(
    tools: Sequence[Mapping[str, Any]],
    family: str,
    *,
    named: str = "",
    is_single: bool = False,
    token_of: TokenOf,
) -> str:
    """For an answer that calls one or more of `tools` (OpenAI's form), or the one that is `named`, and says
    nothing else.

    family: a module of mlx_lm.tool_parsers, or one of ours. is_single: there is one call at most. Raises
    GrammarError for a family whose notation is not known here.
    """
    notation = NOTATIONS.get(family)
    if notation is None:
        raise GrammarError(f"calls in this model's notation ({family}) cannot be forced, only left to it")
    functions = [tool["function"] for tool in tools if named in ("", tool["function"]["name"])]
    writer = _Writer(notation, token_of)
    calls = " | ".join([writer.call(f"f{i}", function) for i, function in enumerate(functions)])
    begin, end = lark(notation.begin, token_of), lark(notation.end, token_of)
    more = "" if is_single or notation.between is None else f"({lark(notation.between, token_of)} call)*"
    rules = [f"start: {begin} call {more} {end}", f"call: {calls}", *writer.rules]
    return grammars_text([{"lark_grammar": "\n".join(rules)}, *writer.schemas])


@dataclass(slots=True)
class _Writer:
    """Writes one function after the other; the rules and schemas that their calls need come together here."""

    notation: JsonCalls | TaggedCalls
    token_of: TokenOf
    rules: list[str] = field(default_factory=list)
    schemas: list[dict[str, Any]] = field(default_factory=list)

    def call(self, rule: str, function: Mapping[str, Any]) -> str:
        """The expression of a call; `rule` begins the names of its rules."""
        name, notation = function["name"], self.notation
        parameters = {"type": "object", **(function.get("parameters") or {"properties": {}})}
        if isinstance(notation, TaggedCalls):
            before, after = notation.before.replace("NAME", name), self._lark(notation.after)
            return f"{self._lark(before)} {self._values(rule, parameters, notation)} {after}"
        in_json = json.dumps(name, ensure_ascii=False)
        before = notation.before.replace('"NAME"', in_json).replace("NAME", name)
        number = f"/{notation.number}/" if notation.number else ""
        self._add_schema(rule, parameters)
        head, after = self._lark(notation.head), self._lark(notation.after)
        return f"{self._lark(before)} {number} {head} @{rule} {after}"

    def _values(self, prefix: str, parameters: Mapping[str, Any], notation: TaggedCalls) -> str:
        """The arguments in the order of their properties; those that are not required may be left out."""
        definitions = {name: parameters[name] for name in _DEFINITIONS if name in parameters}
        required = parameters.get("required", ())
        parts = []
        for i, (key, schema) in enumerate(parameters.get("properties", {}).items()):
            rule = f"{prefix}_{i}"
            start, end = self._lark(notation.value.replace("KEY", key)), self._lark(notation.value_end)
            kind, choices = _kind(schema, parameters)
            if choices:
                self.rules.append(f"{rule}: {start} ({' | '.join(map(quoted, choices))}) {end}")
            elif kind == "string" or (kind not in _JSON_TYPES and notation.is_text):
                self.rules.append(f"{rule}: {start} {rule}t")
                self.rules.append(any_text(f"{rule}t", notation.value_end, self.token_of))
            else:
                self.rules.append(f"{rule}: {start} @{rule}v {end}")
                self._add_schema(f"{rule}v", schema | definitions if isinstance(schema, dict) else schema)
            parts.append(rule if key in required else f"{rule}?")
        return " ".join(parts)

    def _add_schema(self, name: str, schema: Any) -> None:
        self.schemas.append({"name": name, "json_schema": with_whitespace(schema)})

    def _lark(self, text: str) -> str:
        return lark(text, self.token_of)


def _kind(schema: Any, parameters: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """A schema's type, and its texts where it is a choice of texts."""
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        schema = find_part(parameters, schema["$ref"])
    if not isinstance(schema, dict):
        return None, []
    choices = schema.get("enum")
    is_texts = isinstance(choices, list) and all(isinstance(text, str) and text for text in choices)
    return schema.get("type"), choices if is_texts and choices else []
