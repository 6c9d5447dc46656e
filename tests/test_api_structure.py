"""What a request says about its answer's form, from the fields to the grammar that the ring is given."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.api.errors import ApiError
from cluster.api.schema import ChatBody
from cluster.api.structure import read_structure
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
def test_the_grammar_of_a_request(fields: dict[str, Any], grammar: str) -> None:
    found, field = read_structure(ChatBody(**fields))
    assert found == grammar
    assert field == (list(fields)[-1] if grammar else "")


def test_the_last_stage_gets_the_grammar(served: Served) -> None:
    fields = {"response_format": WRAPPED}
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, {"prompt": "hi"})):
        served.post(path, body | fields)
        assert served.ring.last.sampling.grammar == json_schema_grammar(SCHEMA)
        served.post(path, body)
        assert served.ring.last.sampling.grammar == ""


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
        ("structured_outputs", {"grammar": "root ::= x"}, "with one of json, regex, choice, json_object."),
        ("structured_outputs", {"json": {}, "regex": "a"}, "with one of json, regex, choice, json_object."),
        ("structured_outputs", {"json_object": False}, "json_object must be true."),
        ("guided_json", "{", "guided_json cannot be followed: Expecting property name"),
        ("guided_json", [1], "guided_json cannot be followed: a schema must be an object."),
        ("guided_regex", 5, "a regular expression must be a text."),
        ("guided_choice", [], "the choices must be a list of texts, none of them empty."),
        ("guided_choice", ["a", ""], "the choices must be a list of texts, none of them empty."),
        ("guided_choice", ["a", 1], "the choices must be a list of texts, none of them empty."),
    ],
)
def test_what_is_none_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_structure(ChatBody(**{field: value}))
    assert message in str(caught.value)
    assert (caught.value.status, (caught.value.param or "").startswith(field)) == (400, True)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_bad_schema_is_refused_before_anything_runs(refusing: Served, path: str) -> None:
    body = chat_body() if path == CHAT else {"prompt": "hi"}
    schema = {"properties": {"a": {"uniqueItems": True}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = refusing.error(body | {"response_format": asked}, path=path)
    assert error["message"] == 'response_format cannot be followed: Unimplemented keys: ["uniqueItems"].'
    assert (error["param"], error["code"]) == ("response_format", "invalid_grammar")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "guided_choice",
            "guided_regex and guided_choice exclude each other.",
        ),
        (
            {"response_format": {"type": "json_object"}, "min_tokens": 3},
            "min_tokens",
            "min_tokens: with a grammar (response_format) it must be 0, for that says where an answer ends",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    refusing: Served, fields: dict[str, Any], param: str, message: str
) -> None:
    error = refusing.error(chat_body(**fields), path=CHAT)
    assert (error["message"], error["param"], error["code"]) == (message, param, "invalid_value")


def test_a_schema_that_would_crash_the_library_is_refused(refusing: Served) -> None:
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(3000)}
    schema = {"$defs": {**links, "d3000": {}}, "$ref": "#/$defs/d0"}
    error = refusing.error(chat_body(guided_json={"const": -(2**63)}), path=CHAT)
    assert error["message"] == "guided_json cannot be followed: the grammar library fails on it; simplify it."
    error = refusing.error(chat_body(guided_json=schema), path=CHAT)
    assert (
        "it is nested too deep, counting what its references name: 1000 levels at most." in error["message"]
    )
    assert refusing.http.get("/health").status_code == 200
