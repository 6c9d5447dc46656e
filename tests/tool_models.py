"""Tokenizers of models that reason and call tools: the byte tokenizer with more tokens and another template.

The template is what matters here of a real one (huggingface.co/Qwen/Qwen3-8B).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.tiny_models import NUM_BYTES, SPECIALS

FIRST_ID = NUM_BYTES + len(SPECIALS)  # of the tokens that `write_tokens` adds

# Qwen3: the tools in the system's turn, calls as JSON, results in the user's turn; thinking is on unless told
QWEN3 = """{%- if tools %}{{- '<|system|># Tools' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}\
{%- endfor %}{%- endif %}{%- for message in messages %}\
{%- if message.role == 'tool' %}{{- '<|user|><tool_response>' + message.content + '</tool_response>' }}\
{%- else %}{{- '<|' + message.role + '|>' }}\
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}\
{{- message.content }}{%- for tool_call in message.tool_calls or [] %}\
{%- set tool_call = tool_call.function %}\
{{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' + (tool_call.arguments | tojson) \
+ '}\\n</tool_call>' }}{%- endfor %}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|assistant|>' }}\
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}\
{%- endif %}{%- endif %}"""
QWEN3_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def write_tokens(directory: Path, tokens: Sequence[str], template: str, *, are_special: bool = False) -> None:
    """Adds tokens (the first has FIRST_ID) and a chat template to a folder that has the byte tokenizer."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for i, text in enumerate(tokens):
        entry = {"id": FIRST_ID + i, "content": text, "special": are_special}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append(entry | flags)
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
