"""The JSON of /v1/completions (platform.openai.com/docs/api-reference/completions). Pure."""

from __future__ import annotations

import json
from typing import Any

from cluster.api.choice import Delta, finite
from cluster.api.prompt import Prompt
from cluster.api.shape import Shape, Usage, quote


class CompletionShape(Shape):
    """Text offsets count characters of the choice's own text, the echoed prompt included."""

    chunk_object = "text_completion"

    def opening(self, index: int, prompt: Prompt) -> str:
        if not prompt.echo and not self._options.has_token_ids:
            return ""
        ids = f', "token_ids": [], "prompt_token_ids": {prompt.tokens}' if self._options.has_token_ids else ""
        return self._chunk(
            index, f'"text": {quote(prompt.echo)}, "logprobs": null, "finish_reason": null{ids}'
        )

    def delta(self, index: int, delta: Delta) -> str:
        logprobs = json.dumps(self._logprobs(delta)) if self._options.has_logprobs else "null"
        ids = self._token_ids(delta)
        return self._chunk(
            index, f'"text": {quote(delta.text)}, "logprobs": {logprobs}, "finish_reason": null{ids}'
        )

    def closing(self, index: int, finish_reason: str) -> str:
        return self._chunk(index, f'"text": "", "logprobs": null, "finish_reason": "{finish_reason}"')

    def whole(self, prompts: list[Prompt], answers: list[tuple[Delta, str]], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, (delta, finish_reason) in enumerate(answers):
            choice: dict[str, Any] = {
                "index": index,
                "text": prompts[index].echo + delta.text,
                "logprobs": self._logprobs(delta) if self._options.has_logprobs else None,
                "finish_reason": finish_reason,
            }
            if self._options.has_token_ids:
                choice["prompt_token_ids"] = prompts[index].tokens
                choice["token_ids"] = [token.id for token in delta.tokens]
            choices.append(choice)
        return self._head | {"choices": choices, "usage": usage.content()}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        tops = []
        for token in delta.tokens:
            top: dict[str, float] = {}
            for other in token.top[: self._options.num_top]:
                top.setdefault(self._token_text(other.id), finite(other.logprob))
            top.setdefault(self._token_text(token.id), finite(token.logprob))
            tops.append(top)
        return {
            "text_offset": delta.offsets,
            "token_logprobs": [finite(token.logprob) for token in delta.tokens],
            "tokens": [self._token_text(token.id) for token in delta.tokens],
            "top_logprobs": tops,
        }
