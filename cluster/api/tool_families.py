"""How each model family writes tool calls: mlx-lm's parsers, and how calls are read as they grow. Pure.

The parsers are mlx-lm's own modules (mlx_lm/tool_parsers), loaded without the package around them: its import
takes a second, and MLX with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.api import own_families
from cluster.api.reasoning import XTML_TOKENS

_PACKAGE = "macrame_mlx_lm_tool_parsers"
_FAILURES = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError)


@dataclass(frozen=True, slots=True)
class GrowingCalls:
    """Calls whose arguments are JSON in the text: what stands before (groups `name`, `id`) and after."""

    head: re.Pattern[str]
    tail: re.Pattern[str]


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """Calls with tags around each argument."""

    head: re.Pattern[str]  # what stands before the arguments; group `name`
    start: str  # of an argument
    end: str
    call_end: str = ""  # of a call, where a block may hold several
    closing: str = ""  # what makes a call whole after any of its arguments


@dataclass(frozen=True, slots=True)
class ParsedCall:
    """`arguments` is a JSON object; `id` the model's own, if it gave one."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolFamily:
    """One way of writing tool calls; `name` is a module of mlx_lm.tool_parsers or has an `own_parse`."""

    name: str
    start: str
    end: str  # empty: the calls go on to the answer's end
    tokens: tuple[str, ...]  # of the vocabulary: the parser must see them, also where they are special
    growing: GrowingCalls | None = None
    tagged: TaggedCalls | None = None
    num_id_chars: int = 0  # letters and digits of a call's id; 0: any text will do
    is_first: bool = False  # `start` is one only where the answer begins with it
    own_parse: Callable[[str, Sequence[Mapping[str, Any]]], Any] | None = None

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]]) -> list[ParsedCall]:
        """The calls in what stood between `start` and `end`; raises ValueError where there is none."""
        try:
            parse = self.own_parse or _parser(self.name).parse_tool_call
            found = parse(text, list(tools))
            return [_checked(call) for call in (found if isinstance(found, list) else [found])]
        except _FAILURES as error:
            raise ValueError(f"the text is no tool call of {self.name}: {error}") from error


def _checked(call: Any) -> ParsedCall:
    name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    own_id = call.get("id")
    return ParsedCall(
        name, json.dumps(arguments, ensure_ascii=False), own_id if isinstance(own_id, str) else None
    )


def _parser(name: str) -> ModuleType:
    """The module `name` of mlx_lm.tool_parsers."""
    if _PACKAGE not in sys.modules:
        found = importlib.util.find_spec("mlx_lm")
        assert found is not None
        assert found.submodule_search_locations is not None
        folder = Path(found.submodule_search_locations[0]) / "tool_parsers"
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{name}")


def _growing(head: str, tail: str) -> GrowingCalls:
    return GrowingCalls(re.compile(head, re.DOTALL), re.compile(tail, re.DOTALL))


_JSON = _growing(
    r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', r"\s*\}\s*"
)
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_CALL = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
_KIMI_JSON = _growing(
    r"\s*<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^<]+?):\d+)\s*"
    r"<\|tool_call_argument_begin\|>\s*(?=\{)",
    r"\s*<\|tool_call_end\|>\s*",
)
# [CALL_ID] as Mistral Small 3.1 has it
_MISTRAL_JSON = _growing(
    r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[\w-]+)\s*(?:\[CALL_ID\]\s*(?P<id>\w+)\s*)?\[ARGS\]\s*(?=\{)", r"\s*"
)
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_JSON = _growing(own_families.DEEPSEEK_HEAD, own_families.DEEPSEEK_TAIL)
_DSML = ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>")
_LLAMA_JSON = _growing(own_families.LLAMA_HEAD, own_families.LLAMA_TAIL)
_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_TOOL_CALL = ("<tool_call>", "</tool_call>")


def _tagged(head: str, start: str, end: str, call_end: str = "") -> TaggedCalls:
    return TaggedCalls(re.compile(head, re.DOTALL), start, end, call_end, call_end)


def _of(name: str, start: str, end: str, *tokens: str, tagged: TaggedCalls | None = None) -> ToolFamily:
    return ToolFamily(name, start, end, (start, end, *tokens), tagged=tagged)


_GLM_TOKENS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_LONGCAT_TOKENS = tuple(token.replace("arg_", "longcat_arg_") for token in _GLM_TOKENS)
_GLM = _tagged(r"\s*(?P<name>[^<\s{]+)\s*(?=<arg_key>|</tool_call>)", *_GLM_TOKENS[2:])
_LONGCAT = _tagged(
    r"\s*(?P<name>[^<\s{]+)\s*(?=<longcat_arg_key>|</longcat_tool_call>)", *_LONGCAT_TOKENS[2:]
)
_QWEN3_CODER = _tagged(r"\s*<function=(?P<name>[^>\s]+)>", "<parameter=", "</parameter>", "</function>")
_MINIMAX = _tagged(r'\s*<invoke name="?(?P<name>[^">]+)"?>', "<parameter name=", "</parameter>", "</invoke>")
_MINICPM = _tagged(r"\s*[\"']?(?P<name>[^\"'>\s]+)[\"']?\s*>", "<param ", "</param>")
_MUSE = _tagged(
    r'\s*<atem:invoke\b[^>]*?\bname="(?P<name>[^"]+)">',
    *("<atem:parameter", "</atem:parameter>", "</atem:invoke>"),
)
_KIMI_K3 = _tagged(
    r'\s*<\|open\|>call(?:(?!<\|sep\|>).)*?\btool="(?P<name>[^"]+)"(?:(?!<\|sep\|>).)*<\|sep\|>',
    *("<|open|>argument", "<|close|>argument<|sep|>", "<|close|>call<|sep|>"),
)
_DSML_CALL = _tagged(
    r'\s*<｜DSML｜invoke name="(?P<name>[^"]+)">',
    *("<｜DSML｜parameter", "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
)

FAMILIES: Mapping[str, ToolFamily] = {
    family.name: family
    for family in (
        ToolFamily("json_tools", *_TOOL_CALL, _TOOL_CALL, _JSON),
        ToolFamily("kimi_k2", *_KIMI, (*_KIMI, *_KIMI_CALL), _KIMI_JSON),
        ToolFamily("mistral", _MISTRAL[0], "", _MISTRAL, _MISTRAL_JSON, num_id_chars=9),
        _of("qwen3_coder", *_TOOL_CALL, tagged=_QWEN3_CODER),
        _of("glm47", *_TOOL_CALL, *_GLM_TOKENS, tagged=_GLM),
        _of("laguna", *_TOOL_CALL, *_GLM_TOKENS, tagged=_GLM),
        _of("longcat", "<longcat_tool_call>", "</longcat_tool_call>", *_LONGCAT_TOKENS, tagged=_LONGCAT),
        _of("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", tagged=_MINIMAX),
        _of("minicpm5", "<function name=", "</function>", "<param", "</param>", tagged=_MINICPM),
        _of("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>'),
        _of("function_gemma", "<start_function_call>", "<end_function_call>", "<escape>"),
        _of("pythonic", "<|tool_call_start|>", "<|tool_call_end|>"),
        _of("muse_spark", "<atem:function_calls>", "</atem:function_calls>", tagged=_MUSE),
        _of("kimi_k3", "<|open|>tools<|sep|>", "<|close|>tools<|sep|>", *XTML_TOKENS, tagged=_KIMI_K3),
        ToolFamily(
            "deepseek",
            *_DEEPSEEK,
            (*_DEEPSEEK, *own_families.DEEPSEEK_CALL),
            _DEEPSEEK_JSON,
            own_parse=own_families.refuse,
        ),
        ToolFamily("deepseek_v32", *_DSML, _DSML, tagged=_DSML_CALL, own_parse=own_families.parse_dsml),
        ToolFamily(
            "llama",
            own_families.LLAMA_START,
            "",
            (),
            _LLAMA_JSON,
            is_first=True,
            own_parse=own_families.parse_llama,
        ),
    )
}

# What a chat template holds, in mlx-lm's order (mlx_lm/tokenizer_utils.py, _infer_tool_parser)
_IN_TEMPLATE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<start_function_call>",), "function_gemma"),
    (("<longcat_tool_call>",), "longcat"),
    (("<arg_key>",), "glm47"),
    (("<|tool_list_start|>",), "pythonic"),
    (("<|tool_call_start|>",), "pythonic"),
    (("<tool_call>\\n<function=",), "qwen3_coder"),
    (("<tool_call>\n<function=",), "qwen3_coder"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (('<function name="', '<param name="'), "minicpm5"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<atem:function_calls>",), "muse_spark"),
    (("<tool_call>", "tool_call.name"), "json_tools"),
    # where mlx-lm has no parser
    (("<｜tool▁calls▁begin｜>",), "deepseek"),
    (("｜DSML｜",), "deepseek_v32"),
    (('{"name": function name, "parameters": dictionary',), "llama"),
)


def find_family(named: str | None, template: str, vocab: Container[str]) -> ToolFamily | None:
    """The family that is `named` (tool_parser_type), else the template's, else the vocabulary's."""
    if named is not None and named in FAMILIES:
        return FAMILIES[named]
    for needles, name in _IN_TEMPLATE:
        if all(needle in template for needle in needles):
            return FAMILIES[name]
    if all(token in vocab for token in XTML_TOKENS):
        return FAMILIES["kimi_k3"]
    if "<|tool_call_start|>" in vocab and "<|tool_call_end|>" in vocab:
        return FAMILIES["pythonic"]
    return None
