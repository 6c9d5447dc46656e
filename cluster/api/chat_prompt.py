"""A chat request as token ids, with what reads its answers. Pure; may run in any thread."""

from __future__ import annotations

from typing import Any

from cluster.api.chat_grammar import chat_grammar
from cluster.api.chat_messages import read_messages, with_text_arguments
from cluster.api.errors import bad_request
from cluster.api.plain_tools import with_plain_tools
from cluster.api.prompt import Limits, Prompt, refuse_long_text
from cluster.api.schema import ChatBody
from cluster.api.syntax import ModelSyntax
from cluster.api.tools import ToolUse, read_tools
from cluster.tokenizer import ChatError, Tokenizer

_THINKING_SWITCHES = ("enable_thinking", "thinking")


def read_chat(body: ChatBody, tokenizer: Tokenizer, syntax: ModelSyntax, limits: Limits) -> Prompt:
    """`messages` and `tools` through the model's chat template; raises ApiError."""
    messages = read_messages(body.messages, tokenizer)
    use = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    num_chars = sum(len(message["content"]) for message in messages)
    refuse_long_text(num_chars, tokenizer, limits, "messages")
    arguments = _template_arguments(body, tokenizer)
    try:
        tokens = _render(body, messages, use, arguments, tokenizer)
    except ChatError as error:
        raise bad_request(str(error), "messages", "chat_template_error") from None
    if not tokens:
        raise bad_request(
            "The chat template makes an empty prompt of your messages.", "messages", "empty_prompt"
        )
    begun = messages[-1]["content"] if body.continue_final_message else None
    make_reader, shown_ids = syntax.reading(use, begun=begun, prompt=tokens)
    grammar, field = chat_grammar(body, use, syntax, prompt=tokens, begun=begun)
    return Prompt(tokens, make_reader=make_reader, shown_ids=shown_ids, grammar=grammar, grammar_field=field)


def _render(
    body: ChatBody,
    messages: list[dict[str, Any]],
    use: ToolUse,
    arguments: dict[str, Any],
    tokenizer: Tokenizer,
) -> list[int]:
    """The prompt's tokens; raises ChatError."""

    def encode(chat: list[dict[str, Any]], tools: tuple[dict[str, Any], ...] = ()) -> list[int]:
        return tokenizer.encode_chat(
            chat,
            add_generation_prompt=not is_continued and body.add_generation_prompt is not False,
            continue_final_message=is_continued,
            tools=tools,
            documents=body.documents or (),
            template_args=arguments,
        )

    is_continued = bool(body.continue_final_message)
    if tokenizer.takes_tools:
        if tokenizer.takes_arguments_as_text:
            return encode(with_text_arguments(messages), use.tools)
        try:
            return encode(messages, use.tools)
        except ChatError:
            if not any("tool_calls" in message for message in messages):
                raise
            try:  # no template says which of the two it wants
                return encode(with_text_arguments(messages), use.tools)
            except ChatError:
                pass
            raise
    try:
        return encode(with_plain_tools(messages, use.tools))
    except ChatError:
        if not use.tools or messages[0]["role"] == "system":
            raise
        return encode(with_plain_tools(messages, use.tools, has_system=False))


def _template_arguments(body: ChatBody, tokenizer: Tokenizer) -> dict[str, Any]:
    """The template's variables: the client's own go before those that other fields stand for."""
    arguments: dict[str, Any] = {}
    if body.documents and not tokenizer.template_mentions("documents"):
        raise bad_request(
            "documents: this model's chat template takes none; put them into a message.",
            "documents",
            "unsupported_parameter",
        )
    if body.reasoning_effort is not None:
        switches = [name for name in _THINKING_SWITCHES if tokenizer.template_mentions(name)]
        if tokenizer.template_mentions("reasoning_effort"):
            arguments["reasoning_effort"] = body.reasoning_effort
        elif not switches:
            raise bad_request(
                "reasoning_effort: this model's chat template takes none; leave it out.",
                "reasoning_effort",
                "unsupported_parameter",
            )
        arguments |= dict.fromkeys(switches, body.reasoning_effort != "none")
    return arguments | (body.chat_template_kwargs or {})
