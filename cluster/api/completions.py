"""The JSON of /v1/completions (platform.openai.com/docs/api-reference/completions). Pure."""

from __future__ import annotations

import json
from typing import Any

from cluster.api.choice import Delta, finite, known
from cluster.api.prompt import Prompt
from cluster.api.shape import ChunkShape, quote


class CompletionShape(ChunkShape):
    """Text offsets count characters of the choice's own text, the echoed prompt included."""

    object_name = "text_completion"
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

    def closing(self, index: int, finish_reason: str, stop_string: str) -> str:
        return self._chunk(index, f'"text": "", "logprobs": null, "finish_reason": "{finish_reason}"')

    def _token_text(self, token: int) -> str:
        return self._tokenizer.piece(token).decode("utf-8", "replace")

    def _content(self, prompt: Prompt, delta: Delta) -> dict[str, Any]:
        return {"text": prompt.echo + delta.text}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        tokens = [*delta.prompt, *delta.tokens]
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            if not known(token):
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for other in token.top[: self._options.num_top]:
                top.setdefault(self._token_text(other.id), finite(other.logprob))
            top.setdefault(self._token_text(token.id), finite(token.logprob))
            tops.append(top)
        return {
            "text_offset": [*delta.prompt_offsets, *delta.offsets],
            "token_logprobs": [finite(token.logprob) if known(token) else None for token in tokens],
            "tokens": [self._token_text(token.id) for token in tokens],
            "top_logprobs": tops,
        }
