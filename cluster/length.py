"""Whether a request that a command makes of its own fits a context. Pure."""

from __future__ import annotations

from cluster.errors import EXIT_USAGE, UserError


def check_length(prompt_tokens: int, answer_tokens: int, context: int | None, source: str) -> None:
    """Raises UserError where it does not. context: None is not known yet; source: who says so."""
    if context is not None and prompt_tokens + answer_tokens > context:
        raise UserError(
            f"a prompt of {prompt_tokens} and an answer of {answer_tokens} tokens exceed the context of "
            f"{context} tokens ({source}): ask for less",
            EXIT_USAGE,
        )
