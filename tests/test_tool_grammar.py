"""Forced tool calls: what each family writes in its template is allowed, read by mlx-lm, and nothing else."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.api.tool_grammar import NOTATIONS, grammar_for_tools
from cluster.grammar import GrammarError, after_thinking, check_grammar, choice_grammar
from cluster.guide import Guides
from cluster.tokenizer import Tokenizer, load_tokenizer

MODEL = Path(__file__).parent.parent / "deploy" / "demo" / "model"
EOS = 0
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"$ref": "#/$defs/unit"},
                "at": {"type": "array", "items": {"$ref": "#/$defs/at"}},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "°F"]}, "at": {"type": "number"}},
        },
    },
}
TIME = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}
CITY = 'Zürich <b> "x"\n'
# One call as the family's chat template writes it, without what stands around several of them
CALLS = {
    "json_tools": '<tool_call>\n{"name": "get_weather", "arguments": ARGUMENTS}\n</tool_call>',
    "mistral": "[TOOL_CALLS]get_weather[ARGS]ARGUMENTS",
    "kimi_k2": "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>ARGUMENTS"
    "<|tool_call_end|>",
    "deepseek": "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>",
    "harmony": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>ARGUMENTS",
    "llama": '{"name": "get_weather", "parameters": ARGUMENTS}',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nCITY\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n<parameter=at>\n[1.5, -2]\n</parameter>\n</function>\n</tool_call>",
    "glm47": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>CITY</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
    "<arg_key>at</arg_key>\n<arg_value>[1.5, -2]</arg_value>\n</tool_call>",
    "minimax_m2": '<invoke name="get_weather">\n<parameter name="city">CITY</parameter>\n'
    '<parameter name="days">3</parameter>\n<parameter name="at">[1.5, -2]</parameter>\n</invoke>\n',
}
CALLS["laguna"] = CALLS["glm47"]
ARGUMENTS = {"city": CITY, "days": 3, "at": [1.5, -2]}
Accepts = Callable[[str, str], bool]


def no_tokens(text: str) -> int | None:
    return None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def guides() -> Iterator[Guides]:
    made = Guides(MODEL, 4096)
    made.open(choice_grammar(["a"])).allowed([])  # its thread is not one that a test leaves behind
    yield made
    gc.collect()


@pytest.fixture
def accepts(guides: Guides, tokenizer: Tokenizer) -> Accepts:
    """Whether the grammar takes the whole text as an answer."""

    def ask(grammar: str, text: str) -> bool:
        check_grammar(grammar)
        allowed = guides.open(grammar).allowed(tokenizer.encode(text))
        return allowed is not None and bool(allowed[EOS])

    return ask


def written(family: str) -> str:
    call = CALLS[family].replace("CITY", CITY)
    return call.replace("ARGUMENTS", json.dumps(ARGUMENTS, ensure_ascii=False))


def whole(family: str, *calls: str) -> str:
    notation = NOTATIONS[family]
    return notation.begin + (notation.between or "").join(calls) + notation.end


@pytest.mark.parametrize("family", NOTATIONS)
def test_calls_as_the_template_writes_them(accepts: Accepts, family: str) -> None:
    grammar = grammar_for_tools([TIME, WEATHER], family, token_of=no_tokens)
    call = written(family)
    assert accepts(grammar, whole(family, call))
    assert not accepts(grammar, whole(family, call.replace("get_weather", "get_wether")))
    assert not accepts(grammar, whole(family, call.replace("3", "30")))
    assert not accepts(grammar, whole(family, call)[:-3])
    assert not accepts(grammar, "Sure! " + whole(family, call))
    assert accepts(grammar, whole(family, call, call)) == (family not in ("harmony", "llama"))
    alone = grammar_for_tools(
        [TIME, WEATHER], family, named="get_weather", is_single=True, token_of=no_tokens
    )
    assert accepts(alone, whole(family, call))
    assert not accepts(alone, whole(family, call, call))
    other = grammar_for_tools([TIME, WEATHER], family, named="get_time", token_of=no_tokens)
    assert not accepts(other, whole(family, call))


@pytest.mark.parametrize("family", sorted(NOTATIONS.keys() - {"deepseek", "harmony", "llama"}))
def test_mlx_lm_reads_them(family: str) -> None:
    """The texts above are true ones: the parser of mlx-lm finds the arguments."""
    parser: Any = importlib.import_module(f"mlx_lm.tool_parsers.{family}")
    text = (
        whole(family, written(family)).removeprefix(parser.tool_call_start).removesuffix(parser.tool_call_end)
    )
    found = parser.parse_tool_call(text, [TIME, WEATHER])
    found = found[0] if isinstance(found, list) else found
    assert found["name"] == "get_weather"
    city = found["arguments"]["city"]
    assert city.rstrip("\n") == CITY.rstrip("\n")
    assert found["arguments"] | {"city": CITY} == ARGUMENTS


def test_choices_of_texts_and_absent_arguments(accepts: Accepts) -> None:
    grammar = grammar_for_tools([TIME, WEATHER], "qwen3_coder", token_of=no_tokens)
    call = written("qwen3_coder")
    assert accepts(grammar, "<tool_call>\n<function=get_time>\n</function>\n</tool_call>")
    unit = "<parameter=unit>\n°F\n</parameter>\n"
    assert accepts(grammar, call.replace("<parameter=at>", unit + "<parameter=at>"))
    assert not accepts(grammar, call.replace("<parameter=at>", unit.replace("°F", "K") + "<parameter=at>"))
    assert not accepts(grammar, "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>")


def test_special_tokens_are_tokens_and_no_text(guides: Guides, tokenizer: Tokenizer) -> None:
    ids = {"[TOOL_CALLS]": 4000, "[ARGS]": 4001, "</think>": 4002}
    call = [4000, *tokenizer.encode("get_time"), 4001, *tokenizer.encode("{}")]
    grammar = grammar_for_tools([TIME], "mistral", token_of=ids.get)
    allowed = guides.open(grammar).allowed(call + call)
    assert allowed is not None
    assert allowed[EOS]
    assert guides.open(grammar).allowed(tokenizer.encode("[TOOL_CALLS]get_time[ARGS]{}")) is None
    thinking = after_thinking(grammar, "<think>", "</think>", token_of=ids.get, is_open=True)
    thoughts = tokenizer.encode("Well, </think> is what I think.")
    allowed = guides.open(thinking).allowed([*thoughts, 4002, *tokenizer.encode("\n\n"), *call])
    assert allowed is not None
    assert allowed[EOS]


def test_tags_that_are_special_tokens_end_a_text(guides: Guides, tokenizer: Tokenizer) -> None:
    ids = {"</parameter>": 4000, "</arg_value>": 4001}
    only_city = {
        "name": "f",
        "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    for family, before, end, after in (
        (
            "qwen3_coder",
            "<tool_call>\n<function=f>\n<parameter=city>\nBonn\n",
            4000,
            "\n</function>\n</tool_call>",
        ),
        ("glm47", "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Bonn", 4001, "\n</tool_call>"),
    ):
        grammar = grammar_for_tools([{"function": only_city}], family, token_of=ids.get)
        allowed = guides.open(grammar).allowed([*tokenizer.encode(before), end, *tokenizer.encode(after)])
        assert allowed is not None
        assert allowed[EOS]


@pytest.mark.parametrize("is_open", [False, True])
def test_thinking_comes_before_the_answer(accepts: Accepts, is_open: bool) -> None:
    grammar = after_thinking(
        choice_grammar(["yes"]), "<think>", "</think>", token_of=no_tokens, is_open=is_open
    )
    start = "" if is_open else "<think>"
    assert accepts(grammar, f"{start}\nno </thin yes\n</think>\n\nyes")
    assert accepts(grammar, f"{start}</think>yes")
    assert accepts(grammar, "yes") != is_open
    assert not accepts(grammar, f"{start}yes")
    assert not accepts(grammar, f"{start}</think>no")


def test_a_notation_that_is_not_known_is_refused() -> None:
    with pytest.raises(GrammarError, match=r"calls in this model's notation \(gemma4\) cannot be forced"):
        grammar_for_tools([TIME], "gemma4", token_of=no_tokens)


def test_a_bad_schema_of_a_tool_is_refused_with_its_reason() -> None:
    tool = {"function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(GrammarError, match="Unimplemented keys"):
        check_grammar(grammar_for_tools([tool], "json_tools", token_of=no_tokens))
