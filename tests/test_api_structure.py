"""What a request says about its answer's form, from the fields to the grammar that the ring is given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.grammar import choice_grammar, json_object_grammar, json_schema_grammar, regex_grammar
from tests.api_server import CHAT, COMPLETIONS, Served, chat_body

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WRAPPED = {
    "type": "json_schema",
    "json_schema": {"name": "x", "strict": True, "description": "y", "schema": SCHEMA},
}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, json_object_grammar()),
        ({"response_format": WRAPPED}, json_schema_grammar(SCHEMA)),
        ({"response_format": {"type": "text"}}, ""),
        ({"response_format": {"type": "text"}, "guided_json": SCHEMA}, json_schema_grammar(SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, json_schema_grammar(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, json_object_grammar()),
        ({"guided_json": json.dumps(SCHEMA)}, json_schema_grammar(SCHEMA)),
        ({"guided_regex": "[a-z]+"}, regex_grammar("[a-z]+")),
        ({"guided_choice": ["yes", "no"]}, choice_grammar(["yes", "no"])),
    ],
)
def test_the_last_stage_gets_the_grammar_once(served: Served, fields: dict[str, Any], grammar: str) -> None:
    served.post(CHAT, chat_body(**fields))
    assert served.ring.last.sampling.grammar == grammar
    served.post(COMPLETIONS, {"prompt": "hi", **fields})
    assert served.ring.last.sampling.grammar == grammar


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response_format", "json", 'response_format.type must be "text", "json_object" or "json_schema".'),
        ("response_format", {"type": "xml"}, 'must be "text", "json_object" or "json_schema".'),
        (
            "response_format",
            {"type": "json_object", "schema": {}},
            "response_format.schema is not a field of this",
        ),
        (
            "response_format",
            {"type": "json_schema"},
            "json_schema must be an object with a name and a schema.",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": []}},
            "with a name and a schema.",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {}, "shema": {}}},
            "response_format.json_schema.shema is not a field of this request.",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}},
            "response_format cannot be followed: Invalid type: objct.",
        ),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"uniqueItems": True}}}}},
            'response_format cannot be followed: Unimplemented keys: ["uniqueItems"].',
        ),
        ("structured_outputs", {"grammar": "root ::= x"}, "with one of json, regex, choice, json_object."),
        ("structured_outputs", {"json": {}, "regex": "a"}, "with one of json, regex, choice, json_object."),
        ("structured_outputs", {"json_object": False}, "json_object must be true."),
        ("guided_json", "{", "guided_json cannot be followed: Expecting property name"),
        ("guided_json", [1], "guided_json cannot be followed: a schema must be an object."),
        ("guided_regex", 5, "a regular expression must be a text."),
        ("guided_regex", "(", "guided_regex cannot be followed: "),
        ("guided_choice", [], "the choices must be a list of texts, none of them empty."),
        ("guided_choice", ["a", ""], "the choices must be a list of texts, none of them empty."),
        ("guided_choice", ["a", 1], "the choices must be a list of texts, none of them empty."),
    ],
)
def test_a_bad_one_is_refused_before_anything_runs(
    refusing: Served, field: str, value: Any, message: str
) -> None:
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, {"prompt": "hi"})):
        error = refusing.error(body | {field: value}, path=path)
        assert message in error["message"]
        assert error["param"].startswith(field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "guided_regex and guided_choice exclude each other.",
        ),
        (
            {"response_format": {"type": "json_object"}, "min_tokens": 3},
            "min_tokens: with a grammar (response_format) it must be 0, for that says where an answer ends",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(refusing: Served, fields: dict[str, Any], message: str) -> None:
    assert refusing.error(chat_body(**fields), path=CHAT)["message"] == message


def test_a_schema_that_would_crash_the_library_is_refused(refusing: Served) -> None:
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(3000)}
    schema = {"$defs": {**links, "d3000": {}}, "$ref": "#/$defs/d0"}
    error = refusing.error(chat_body(guided_json=schema), path=CHAT)
    assert (
        "it is nested too deep, counting what its references name: 1000 levels at most." in error["message"]
    )
    assert refusing.http.get("/health").status_code == 200
