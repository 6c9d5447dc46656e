"""The text of grammars: what is refused, with the reason, and that no schema takes the process down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster import grammar
from cluster.grammar import (
    GrammarError,
    check_grammar,
    check_size,
    choice_grammar,
    grammars_text,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with grammar.deep_pool() as one:
        yield one


@pytest.mark.parametrize(
    "text",
    [
        json_object_grammar(),
        json_schema_grammar(True),
        json_schema_grammar({"type": "object", "properties": {"é": {"enum": ["ü", 1, None]}}}),
        json_schema_grammar({"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
        json_schema_grammar(
            {"oneOf": [{"type": "string"}, {"type": "string"}], "x-guidance": {"coerce_one_of": True}}
        ),
        regex_grammar(r"a/b\d+\n"),
        choice_grammar(["yes", 'n"o\n', "é"]),
    ],
)
def test_good_ones_are_taken(pool: ThreadPoolExecutor, text: str) -> None:
    pool.submit(check_grammar, text).result()


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"$ref": "#/$defs/x"}, "Pointer '/$defs/x' does not exist"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum (1)"),
        ({"type": "string", "pattern": "("}, "regex parse error: ( ^ error: unclosed group"),
        ({"$ref": "http://localhost/x"}, "Default retriever does not fetch resources"),
        (False, "Unsatisfiable schema: schema is false"),
        ({"anyOf": [{"$ref": "#"}]}, "no text begins as it says"),
    ],
)
def test_a_bad_schema_is_refused_with_the_reason(pool: ThreadPoolExecutor, schema: Any, reason: str) -> None:
    with pytest.raises(GrammarError) as caught:
        pool.submit(check_grammar, json_schema_grammar(schema)).result()
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([1], "a schema must be an object"),
        ("text", "a schema must be an object"),
        ({"x-guidance": 1}, "x-guidance must be an object"),
    ],
)
def test_what_is_no_schema_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        json_schema_grammar(schema)


@pytest.mark.parametrize("text", ["start: a", "[]", '{"grammars": 5}', '{"grammars": [5]}'])
def test_what_is_no_list_of_grammars_is_refused(text: str) -> None:
    with pytest.raises(GrammarError, match="it is no list of grammars"):
        check_size(text)


def test_a_long_one_is_refused() -> None:
    with pytest.raises(GrammarError, match=r"it takes 3\d+ bytes, and 262144 are allowed"):
        check_size(json_schema_grammar({"const": "x" * 300_000}))


def chained(num_links: int, link: dict[str, Any] | None = None) -> str:
    """Definitions, each of which refers to the next."""
    definitions: dict[str, Any] = {
        f"d{i}": {"additionalProperties": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(num_links)
    }
    definitions[f"d{num_links}"] = link or {"type": "null"}
    return json_schema_grammar({"$defs": definitions, "$ref": "#/$defs/d0"})


def test_references_count_as_depth(pool: ThreadPoolExecutor) -> None:
    """The library has no limit there: 3000 of them end the process with a segmentation fault."""
    pool.submit(check_grammar, chained(490)).result()  # on our stack it holds
    with pytest.raises(GrammarError, match="nested too deep, counting what its references name: 1000 levels"):
        check_size(chained(500))
    part = json.loads(chained(250))["grammars"]
    with pytest.raises(GrammarError, match="nested too deep"):
        check_size(grammars_text(part * 2))


@pytest.mark.parametrize(
    "reference", ["#/$defs/%64%30", "#somewhere", "#/$defs/d0/additionalProperties/$ref/x"]
)
def test_a_reference_that_is_not_found_counts_as_the_whole(reference: str) -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"items": deep}
    check_size(json_schema_grammar({"$defs": {"d0": deep}, "$ref": "#/$defs/d0"}))
    with pytest.raises(GrammarError, match="nested too deep"):
        check_size(
            json_schema_grammar(
                {"$defs": {"d0": deep}, "prefixItems": [{"$ref": "#/$defs/d0"}, {"$ref": reference}]}
            )
        )


def test_depth_beyond_the_interpreter_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(GrammarError, match="nested too deep"):
        json_schema_grammar(deep)


def test_pointers_go_through_lists_and_escapes() -> None:
    schema = {"prefixItems": [{"a/b": {"~c": {"deep": {}}}}], "$ref": "#/prefixItems/0/a~1b/~0c"}
    assert grammar.find_part(schema, schema["$ref"]) == {"deep": {}}
    assert grammar.find_part(schema, "#/prefixItems/1") is None
    assert grammar.find_part(schema, "#/prefixItems/0/a~1b/~0c/deep/x") is None


def test_blanks_are_bounded_unless_the_schema_says_otherwise() -> None:
    def blanks(schema: dict[str, Any]) -> Any:
        return json.loads(json_schema_grammar(schema))["grammars"][0]["json_schema"].get("x-guidance")

    assert blanks({}) == {"whitespace_pattern": grammar.WHITESPACE}
    assert blanks({"x-guidance": {"lenient": True}}) == {
        "whitespace_pattern": grammar.WHITESPACE,
        "lenient": True,
    }
    assert blanks({"x-guidance": {"whitespace_flexible": False}}) == {"whitespace_flexible": False}
    assert blanks({"x-guidance": {"whitespace_pattern": " "}}) == {"whitespace_pattern": " "}
