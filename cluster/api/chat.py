"""The JSON of /v1/chat/completions (platform.openai.com/docs/api-reference/chat). Pure."""

from __future__ import annotations

import json
from typing import Any

from cluster.api.choice import Delta
from cluster.api.logprobs import TokenLogprobs
from cluster.api.parts import CallArguments, CallEnd, CallStart, Content, Message, Reasoning
from cluster.api.prompt import Prompt
from cluster.api.shape import AnswerOptions, ChunkShape, Usage, quote
from cluster.tokenizer import Tokenizer


class ChatShape(ChunkShape):
    """Chunks begin with the role; token ids are placed where vLLM places them."""

    object_name = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, answer_id: str, created_s: int, model: str, options: AnswerOptions, tokenizer: Tokenizer
    ) -> None:
        super().__init__(answer_id, created_s, model, options, tokenizer)
        self._token_logprobs = TokenLogprobs(tokenizer, options.num_top)

    def opening(self, index: int, prompt: Prompt) -> str:
        ids = f', "prompt_token_ids": {prompt.tokens}' if self._options.has_token_ids else ""
        chunk = self._chunk(
            index,
            f'"delta": {{"role": "assistant", "content": ""}}, "logprobs": null, "finish_reason": null{ids}',
        )
        if ids:  # vLLM has them beside the choices
            chunk = chunk.replace("data: {", f'data: {{"prompt_token_ids": {prompt.tokens}, ', 1)
        return chunk

    def delta(self, index: int, delta: Delta) -> str:
        """A chunk for each part; the first one has the log-probabilities and token ids of all."""
        deltas = [_delta(part) for part in delta.as_parts() if not isinstance(part, CallEnd)]
        logprobs = json.dumps(self._logprobs(delta)) if self._options.has_logprobs else "null"
        ids = self._token_ids(delta)
        chunks = []
        for fields in deltas or ['"content": ""']:
            chunks.append(
                self._chunk(
                    index, f'"delta": {{{fields}}}, "logprobs": {logprobs}, "finish_reason": null{ids}'
                )
            )
            logprobs, ids = "null", ""
        return "".join(chunks)

    def closing(self, index: int, finish_reason: str, stop_string: str) -> str:
        return self._chunk(index, f'"delta": {{}}, "logprobs": null, "finish_reason": "{finish_reason}"')

    def whole(self, prompts: list[Prompt], answers: list[tuple[Delta, str]], usage: Usage) -> dict[str, Any]:
        content = super().whole(prompts, answers, usage)
        if self._options.has_token_ids:
            content["prompt_token_ids"] = prompts[0].tokens
        return content

    def _content(self, prompt: Prompt, delta: Delta) -> dict[str, Any]:
        said = Message.of(delta.as_parts())
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.reasoning:
            message |= {"reasoning_content": said.reasoning, "reasoning": said.reasoning}
        if said.calls:
            message["content"] = said.content or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in said.calls
            ]
        return {"message": message}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return {"content": self._token_logprobs.entries(delta.tokens), "refusal": None}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        details = {"reasoning_tokens": usage.reasoning_tokens}
        return super()._usage(usage) | {"completion_tokens_details": details}


def _delta(part: Content | Reasoning | CallStart | CallArguments) -> str:
    """The fields of a chunk's delta. Reasoning has DeepSeek's name and that of vLLM and mlx-lm."""
    match part:
        case Content(text):
            return f'"content": {quote(text)}'
        case Reasoning(text):
            return f'"reasoning_content": {quote(text)}, "reasoning": {quote(text)}'
        case CallStart(index, call_id, name):
            function = f'{{"name": {quote(name)}, "arguments": ""}}'
            call = f'"index": {index}, "id": {quote(call_id)}, "type": "function", "function": {function}'
        case CallArguments(index, text):
            call = f'"index": {index}, "function": {{"arguments": {quote(text)}}}'
    return f'"tool_calls": [{{{call}}}]'
