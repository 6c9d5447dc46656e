"""Requests in other dialects than chats: Anthropic's Messages, OpenAI's Responses. Event loop only.

Each is translated into a chat, and the chat's answer is written in the dialect's shape.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.api import messages_prompt, responses_prompt
from cluster.api.answer import Answer, Job
from cluster.api.dialect import renamed
from cluster.api.errors import bad_request
from cluster.api.logprobs import TokenLogprobs
from cluster.api.messages import MessagesShape
from cluster.api.messages_body import MessagesBody, MessagesChat
from cluster.api.responses import ResponsesShape
from cluster.api.responses_body import ResponsesBody
from cluster.api.schema import ChatBody, parse_body, read_body
from cluster.api.service import Service
from cluster.logs import current_request
from cluster.tokenizer import Tokenizer

# What the chat's fields are called in each dialect, for its refusals.
_MESSAGES_NAMES = {"response_format": "output_config.format"}
_RESPONSES_NAMES = {"response_format": "text.format", "messages": "input"}


class Dialects:
    """The handlers of these endpoints; all raise ApiError."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def messages(self, raw: bytes) -> Answer:
        """POST /v1/messages."""
        body = parse_body(raw, MessagesBody)
        asked = body.max_tokens
        if asked is None:
            raise bad_request("max_tokens is missing.", "max_tokens", "missing_parameter")

        def shape(job: Job, tokenizer: Tokenizer) -> MessagesShape:
            return MessagesShape(
                job.requests[0].request_id,
                self._service.served_id(body.model),
                job.num_prompt_tokens,
                current_request.get(),
                is_thinking_shown=body.thinking is None or body.thinking.display != "omitted",
                is_context_limit=job.requests[0].max_tokens < asked,
            )

        chat = self._messages_chat(body)
        chat.max_tokens = asked
        with renamed(_MESSAGES_NAMES):
            return await self._service.answer_chat(chat, len(raw), "msg_", shape, is_clamped=True)

    async def count_messages(self, raw: bytes) -> dict[str, Any]:
        """POST /v1/messages/count_tokens."""
        chat = self._messages_chat(parse_body(raw, MessagesBody))
        return {"input_tokens": len((await self._service.chat_prompt(chat, len(raw))).tokens)}

    async def responses(self, raw: bytes) -> Answer:
        """POST /v1/responses."""
        body = parse_body(raw, ResponsesBody)

        def shape(job: Job, tokenizer: Tokenizer) -> ResponsesShape:
            model = self._service.served_id(body.model)
            told = _told(body, job.requests[0].request_id, model)
            logprobs = TokenLogprobs(tokenizer, body.top_logprobs or 0) if body.has_logprobs else None
            return ResponsesShape(told, logprobs)

        with renamed(_RESPONSES_NAMES):
            return await self._service.answer_chat(self._responses_chat(body), len(raw), "resp_", shape)

    async def count_responses(self, raw: bytes) -> dict[str, Any]:
        """POST /v1/responses/input_tokens."""
        chat = self._responses_chat(parse_body(raw, ResponsesBody))
        with renamed(_RESPONSES_NAMES):
            prompt = await self._service.chat_prompt(chat, len(raw))
        return {"object": "response.input_tokens", "input_tokens": len(prompt.tokens)}

    def _messages_chat(self, body: MessagesBody) -> MessagesChat:
        body.check()
        tokenizer = self._service.tokenizer(body.model)
        return read_body(messages_prompt.to_chat(body, tokenizer.template_mentions), MessagesChat)

    def _responses_chat(self, body: ResponsesBody) -> ChatBody:
        body.check()
        tokenizer = self._service.tokenizer(body.model)
        return read_body(responses_prompt.to_chat(body, tokenizer.template_mentions), ChatBody)


def _told(body: ResponsesBody, answer_id: str, model: str) -> dict[str, Any]:
    """What a response says of its request. Nothing is stored, whatever `store` was."""
    reasoning = body.reasoning
    text_format = None if body.text is None else body.text.format
    return {
        "id": answer_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "store": False,
        "background": False,
        "temperature": body.temperature,
        "text": {"format": text_format or {"type": "text"}},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
    }
