"""Notations of tool calls for which mlx-lm has a chat template or a model, but no parser. Pure.

DeepSeek's are those of its templates (huggingface.co/deepseek-ai), Llama's that of Llama 3.1 and later
(github.com/meta-llama/llama-models, models/llama3_1/prompt_format.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_INVOKE = re.compile(r'<｜DSML｜invoke name="(?P<name>[^"]+)">(?P<body>.*?)</｜DSML｜invoke>', re.DOTALL)
_PARAMETER = re.compile(
    r'<｜DSML｜parameter name="(?P<name>[^"]+)" string="(?P<is_text>true|false)">(?P<value>.*?)'
    r"</｜DSML｜parameter>",
    re.DOTALL,
)
DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
DEEPSEEK_HEAD = (
    r"\s*<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>)?(?P<name>[^<\s]+)\s*"
    r"(?:<｜tool▁sep｜>|```json)\s*(?=\{)"
)
DEEPSEEK_TAIL = r"(?:\s*```)?\s*<｜tool▁call▁end｜>\s*"
LLAMA_START = '{"name":'
LLAMA_HEAD = r'\s*(?:\{\s*"name"\s*:)?\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)'
LLAMA_TAIL = r"\s*\}\s*;?\s*"


def parse_dsml(text: str, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The calls of DeepSeek V3.2; raises ValueError where a value is not JSON."""
    calls = []
    for invoke in _INVOKE.finditer(text):
        arguments = {
            parameter["name"]: (
                parameter["value"] if parameter["is_text"] == "true" else json.loads(parameter["value"])
            )
            for parameter in _PARAMETER.finditer(invoke["body"])
        }
        calls.append({"name": invoke["name"], "arguments": arguments})
    if not calls:
        raise ValueError("there is no invoke")
    return calls


def parse_llama(text: str, tools: Sequence[Mapping[str, Any]]) -> Any:
    """What follows `LLAMA_START`, where it did not have the usual order; raises ValueError."""
    return json.loads(LLAMA_START + text)


def refuse(text: str, tools: Sequence[Mapping[str, Any]]) -> Any:
    """For a notation that is only read as it grows; always raises ValueError."""
    raise ValueError("there is no call")
