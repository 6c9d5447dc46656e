"""Answers as each model family writes them, cut anywhere, become the same content, reasoning and calls."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from cluster.api.message_reader import MessageReader, State, Syntax
from cluster.api.parts import Call, CallArguments, CallEnd, CallStart, Content, Message, Part, Reasoning
from cluster.api.reasoning import ThinkMarkers
from cluster.api.syntax import _MUSE_EDGES as MUSE_EDGES
from cluster.api.tool_families import FAMILIES

THINK = ThinkMarkers("<think>", "</think>")


def tool(name: str, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in types.items()}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TOOLS = [tool("get_weather", city="string", days="integer"), tool("now")]
WEATHER = ("get_weather", {"city": "Köln", "days": 2})
NOW = ("now", {})

# Two calls, or one where the family's block holds one: as the templates and parsers of mlx-lm have them
ANSWERS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]]]] = {
    "json_tools": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [WEATHER, NOW],
    ),
    "mistral": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "days": 2}[TOOL_CALLS]now[ARGS]{}',
        [WEATHER, NOW],
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Köln", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        [WEATHER, NOW],
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [WEATHER, NOW],
    ),
    "glm47": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Köln</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call><tool_call>now</tool_call>",
        [WEATHER, NOW],
    ),
    "laguna": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Köln</arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
        [WEATHER],
    ),
    "longcat": (
        "<longcat_tool_call>get_weather<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Köln"
        "</longcat_arg_value><longcat_arg_key>days</longcat_arg_key><longcat_arg_value>2"
        "</longcat_arg_value></longcat_tool_call>",
        [WEATHER],
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
        "</minimax:tool_call>",
        [WEATHER, NOW],
    ),
    "minicpm5": (
        '<function name="get_weather"><param name="city"><![CDATA[Köln]]></param>'
        '<param name="days">2</param></function>\n<function name="now"></function>',
        [WEATHER, NOW],
    ),
    "gemma4": (
        '<|tool_call>call:get_weather{city:<|"|>Köln<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>',
        [WEATHER, NOW],
    ),
    "function_gemma": (
        "<start_function_call>call:get_weather{city:<escape>Köln<escape>,days:2}<end_function_call>",
        [WEATHER],
    ),
    "pythonic": (
        '<|tool_call_start|>[get_weather(city="Köln", days=2), now()]<|tool_call_end|>',
        [WEATHER, NOW],
    ),
    "muse_spark": (
        '<atem:function_calls><atem:invoke name="get_weather"><atem:parameter name="city">Köln'
        '</atem:parameter><atem:parameter name="days">2</atem:parameter></atem:invoke></atem:function_calls>',
        [WEATHER],
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" '
        'type="string"<|sep|>Köln<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>2'
        "<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
        [WEATHER],
    ),
}


ANSWERS |= {
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Köln", "days": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [WEATHER, NOW],
    ),
    "deepseek_v32": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" '
        'string="true">Köln</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2'
        '</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        [WEATHER, NOW],
    ),
    "llama": (
        '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}; '
        '{"name": "now", "parameters": {}}',
        [WEATHER, NOW],
    ),
}


def read(text: str, reader: MessageReader, *, num_chars: int = 0, is_cut: bool = False) -> list[Part]:
    """All parts of `text`, fed at random cuts of up to `num_chars` characters; 0: at once."""
    cuts, parts, place = random.Random(text), [], 0
    while place < len(text) and not reader.is_over:
        size = cuts.randint(1, num_chars) if num_chars else len(text)
        parts += reader.feed(text[place : place + size])
        place += size
    return parts + reader.finish(is_cut=is_cut)


def reader_of(family: str, think: ThinkMarkers | None = THINK, **fields: Any) -> MessageReader:
    return MessageReader(Syntax(think, FAMILIES[family]), **({"tools": TOOLS} | fields))


def calls_of(calls: list[Call]) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


def test_every_family_has_a_recorded_answer() -> None:
    assert ANSWERS.keys() == FAMILIES.keys()


def test_calls_of_each_family() -> None:
    for family, (text, calls) in ANSWERS.items():
        said_first = "" if FAMILIES[family].is_first else "One moment."
        whole = f"<think>\nLet me look.\n</think>\n\n{said_first}\n{text}"
        for num_chars in (0, 1, 7):
            parts = read(whole, reader_of(family), num_chars=num_chars)
            said = Message.of(parts)
            assert (said.reasoning, said.content) == ("Let me look.", said_first), family
            assert calls_of(said.calls) == calls
            assert all(call.is_complete for call in said.calls)
            assert [part.index for part in parts if isinstance(part, CallStart)] == list(range(len(calls)))
            assert len({call.id for call in said.calls}) == len(calls)


def test_calls_without_tools_are_content() -> None:
    for family, (text, _) in ANSWERS.items():
        assert Message.of(read(text, reader_of(family, tools=()))) == Message(text)


@pytest.mark.parametrize("family", ["json_tools", "mistral", "kimi_k2"])
def test_json_arguments_come_as_they_are_written(family: str) -> None:
    text, _ = ANSWERS[family]
    reader, half = reader_of(family), text.index("ln")
    before = reader.feed(text[:half])
    assert isinstance(before[0], CallStart)
    assert before[1:] == [CallArguments(0, '{"city": "Kö')]
    assert reader.feed("ln") == [CallArguments(0, "ln")]


def test_a_marker_within_an_argument_is_text() -> None:
    arguments = '{"city": "a}</tool_call>\\"<think>{[", "x": [{"y": "\\\\"}]}'
    text = f'<tool_call>{{"name": "now", "arguments": {arguments}}}</tool_call>'
    for num_chars in (0, 1, 3):
        (call,) = Message.of(read(text, reader_of("json_tools"), num_chars=num_chars)).calls
        assert call.arguments == arguments


def test_arguments_before_the_name_wait_for_the_end() -> None:
    text = '<tool_call>{"arguments": {"days": 1}, "name": "now"}</tool_call>'
    assert calls_of(Message.of(read(text, reader_of("json_tools"), num_chars=4)).calls) == [
        ("now", {"days": 1})
    ]


def test_mistrals_older_list_and_ids() -> None:
    text = (
        '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abc123XYZ"}, {"name": "now", "arguments": {}}]'
    )
    first, second = Message.of(read(text, reader_of("mistral"), num_chars=5)).calls
    assert first.id == "abc123XYZ"
    assert len(second.id) == 9
    assert second.id.isalnum()
    text = '[TOOL_CALLS]now[CALL_ID]q1w2e3r4t[ARGS]{"days": 3}'
    (call,) = Message.of(read(text, reader_of("mistral"), num_chars=5)).calls
    assert (call.id, call.name, call.arguments) == ("q1w2e3r4t", "now", '{"days": 3}')


def test_the_models_own_ids_are_kept() -> None:
    calls = Message.of(read(ANSWERS["kimi_k2"][0], reader_of("kimi_k2"))).calls
    assert [call.id for call in calls] == ["functions.get_weather:0", "functions.now:1"]
    (call, _) = Message.of(read(ANSWERS["json_tools"][0], reader_of("json_tools"))).calls
    assert call.id.startswith("call_")


def test_an_answer_that_is_cut_within_a_call() -> None:
    for family, (text, _) in ANSWERS.items():
        half = text.index("ln")  # within the first argument
        said = Message.of(read(text[:half], reader_of(family), is_cut=True))
        if FAMILIES[family].growing is not None:
            assert [(call.name, call.is_complete) for call in said.calls] == [("get_weather", False)]
            assert said.calls[0].arguments == '{"city": "Kö'
        elif FAMILIES[family].tagged is not None:
            assert [(call.name, call.arguments, call.is_complete) for call in said.calls] == [
                ("get_weather", "", False)
            ]
        else:  # never a call with less than what the model wanted to say
            assert said == Message(text[:half]), family


def test_tagged_arguments_come_one_by_one() -> None:
    tagged = [name for name, family in FAMILIES.items() if family.tagged is not None]
    assert len(tagged) == 9
    for name in tagged:
        text, reader = ANSWERS[name][0], reader_of(name)
        family = FAMILIES[name].tagged
        assert family is not None
        first = text.index(family.end) + len(family.end)
        start, arguments = reader.feed(text[:first])
        assert isinstance(start, CallStart)
        assert (start.name, arguments) == ("get_weather", CallArguments(0, '{"city": "Köln"')), name
        assert CallArguments(0, ', "days": 2}') in reader.feed(text[first:])


def test_a_tagged_argument_may_hold_markers() -> None:
    value = "a </function>\n</tool_call>\n<tool_call>\n<function=now>"
    text = f"<parameter=city>\n{value}\n</parameter>\n</function>\n</tool_call>"
    text = f"<tool_call>\n<function=get_weather>\n{text}"
    for num_chars in (0, 1, 4):
        (call,) = Message.of(read(text, reader_of("qwen3_coder"), num_chars=num_chars)).calls
        assert json.loads(call.arguments) == {"city": value}


def test_an_argument_of_another_type_than_the_schemas_stays_text() -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=days>\ntwo\n</parameter>\n</function>\n</tool_call>"
    )
    (call,) = Message.of(read(text, reader_of("qwen3_coder"))).calls
    assert call.arguments == '{"days": "two"}'


def test_a_call_that_ends_with_the_answer_needs_no_end_marker() -> None:
    text = "<tool_call>\n<function=now>\n</function>"
    assert calls_of(Message.of(read(text, reader_of("qwen3_coder"))).calls) == [NOW]


@pytest.mark.parametrize(
    "text", ["<tool_call>nothing</tool_call>", "<tool_call>[1, 2]</tool_call>", "<tool_call>"]
)
def test_what_is_no_call_is_content(text: str) -> None:
    assert Message.of(read(text, reader_of("json_tools"), num_chars=3)) == Message(text)


def test_json_that_breaks_off_for_a_marker() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"days": </tool_call>after'
    said = Message.of(read(text, reader_of("json_tools"), num_chars=3))
    assert said.content == "after"
    assert [(call.arguments, call.is_complete) for call in said.calls] == [('{"days": ', False)]


def test_one_call_only() -> None:
    reader = reader_of("json_tools", max_calls=1)
    said = Message.of(read(ANSWERS["json_tools"][0] + "more", reader, num_chars=3))
    assert reader.is_over
    assert said.content == ""
    assert calls_of(said.calls) == [WEATHER]
    assert reader.finish() == []


def test_a_call_ends_the_reasoning() -> None:
    said = Message.of(read(f"hm {ANSWERS['json_tools'][0]}", reader_of("json_tools", is_reasoning=True)))
    assert (said.reasoning, said.content, len(said.calls)) == ("hm", "", 2)


@pytest.mark.parametrize("num_chars", [0, 1, 5])
def test_reasoning_that_the_prompt_began(num_chars: int) -> None:
    for text in ("\nhm\n\n</think>\n\nYes.\n", "<think>\nhm</think>Yes.\n"):  # some write it once more
        parts = read(text, reader_of("json_tools", is_reasoning=True), num_chars=num_chars)
        assert Message.of(parts) == Message("Yes.\n", "hm")
        assert {type(part) for part in parts} == {Reasoning, Content}


def test_a_think_tag_in_an_answer_is_a_word() -> None:
    text = "The tag <think> opens what </think> closes."
    assert Message.of(read(text, reader_of("json_tools"), num_chars=2)) == Message(text)


def test_white_space_of_an_answer_is_kept() -> None:
    for text in ("  indented\n\n  code  \n", "\n", "a <", "<thin"):
        assert Message.of(read(text, reader_of("json_tools"), num_chars=2)) == Message(text)


def test_headers_are_not_shown() -> None:
    syntax = Syntax(
        think=None,
        family=FAMILIES["muse_spark"],
        edges=MUSE_EDGES,
        initial=State.HEADER,
    )
    text = (
        "to=self<|message|>hm<|eom|><|start|>assistant to=user<|message|>Look:<|eom|><|start|>assistant to=x"
    )
    call = "<|message|>" + ANSWERS["muse_spark"][0]
    said = Message.of(read(text + call, MessageReader(syntax, tools=TOOLS), num_chars=3))
    assert (said.reasoning, said.content) == ("hm", "Look:")
    assert calls_of(said.calls) == [WEATHER]
    assert Message.of(read(text + call, MessageReader(syntax), num_chars=3)) == Message("Look:", "hm")


def test_each_call_that_began_ends() -> None:
    for family, (text, _) in ANSWERS.items():
        for size in range(0, len(text), 5):
            parts = read(text[:size], reader_of(family), is_cut=True)
            starts = [part.index for part in parts if isinstance(part, CallStart)]
            assert starts == [part.index for part in parts if isinstance(part, CallEnd)]


def test_cuts_change_nothing_whatever_a_model_writes() -> None:
    """Answers with pieces lost and put in at random: the same parts, however they are cut."""
    chance = random.Random(7)
    for _ in range(10):
        for family, (text, _) in ANSWERS.items():
            pieces = [*re.split(r"(<[^>]*>|[\s{}\":,])", text), "<think>", "</think>", "\\", "<", " ", "x"]
            broken = text
            for _ in range(3):
                place = chance.randrange(len(broken))
                broken = broken[:place] + chance.choice(pieces) + broken[place + chance.randint(0, 8) :]
            is_cut, is_reasoning = chance.random() < 0.3, chance.random() < 0.5
            said = [
                Message.of(
                    read(broken, reader_of(family, is_reasoning=is_reasoning), num_chars=size, is_cut=is_cut)
                )
                for size in (0, 1, 5)
            ]
            for message in said:
                for call in message.calls:
                    call.id = ""
            assert said[0] == said[1] == said[2], (family, broken)
