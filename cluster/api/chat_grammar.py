"""What a chat's answer must keep to: a response format, forced tool calls, reasoning before either. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.api.errors import bad_request
from cluster.api.reasoning import has_begun
from cluster.api.schema import ChatBody
from cluster.api.structure import read_structure, refused
from cluster.api.syntax import ModelSyntax
from cluster.api.tool_grammar import grammar_for_tools
from cluster.api.tools import ToolUse
from cluster.grammar import GrammarError, after_text, after_thinking, either

# An answer of gpt-oss (github.com/openai/harmony, docs/format.md): perhaps an analysis, then a final message
_HARMONY_ANALYSIS = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
_HARMONY_FINAL = "<|channel|>final<|message|>"


def chat_grammar(
    body: ChatBody, use: ToolUse, syntax: ModelSyntax, *, prompt: Sequence[int], begun: str | None
) -> tuple[str, str]:
    """The grammar of answers to `prompt` and the field that asks for it; two empty texts: none.

    begun: the answer's beginning, where the prompt ends with it. With tools to choose from, an answer of a
    fixed form may be a call instead. Raises ApiError.
    """
    grammar, field = read_structure(body)
    if use.must_call and grammar:
        raise bad_request(
            f"{field} and a tool_choice that asks for a call exclude each other.", field, "invalid_value"
        )
    field = field or ("tool_choice" if use.must_call else "")
    if not field:
        return "", ""
    try:
        if syntax.has_headers:
            raise GrammarError(
                "the messages of this model's answers have headers, which no grammar here knows"
            )
        if grammar and syntax.is_harmony and begun is None:
            grammar = after_text(grammar, _HARMONY_FINAL, syntax.added_ids.get)
        if use.tools:
            calls = _calls(use, syntax)
            grammar = either(grammar, calls) if grammar else calls
        return _after_reasoning(grammar, syntax, prompt, begun), field
    except GrammarError as error:
        raise refused(field, error) from None


def _calls(use: ToolUse, syntax: ModelSyntax) -> str:
    family = "harmony" if syntax.is_harmony else syntax.family.name if syntax.family else "none"
    return grammar_for_tools(
        use.tools, family, named=use.named, is_single=use.max_calls == 1, token_of=syntax.added_ids.get
    )


def _after_reasoning(grammar: str, syntax: ModelSyntax, prompt: Sequence[int], begun: str | None) -> str:
    """With room for reasoning, unless the answer is past it."""
    token_of = syntax.added_ids.get
    if syntax.is_harmony:
        if begun is not None:
            return grammar
        start, end = _HARMONY_ANALYSIS
        return after_thinking(grammar, start, end, token_of=token_of, is_open=False)
    think = syntax.think
    if think is None:
        return grammar
    before = syntax.prompt_end(prompt, begun)
    is_open = has_begun(think, before, is_continued=begun is not None)
    if not is_open and (begun is not None or before.rstrip().endswith(think.end)):
        return grammar
    return after_thinking(grammar, think.start, think.end, token_of=token_of, is_open=is_open)
