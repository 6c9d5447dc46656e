"""The `speculation` part of the cluster file: who guesses the next tokens, and how many at once. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config_read import Table

SPECULATION_KEYS = ("method", "draft_model", "max_draft_tokens")
METHODS = ("auto", "ngram", "draft", "off")
MAX_DRAFT_TOKENS = 64  # more are never accepted in a row often enough to pay for their pass


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """What the file says under `speculation`. It changes how fast answers come, never their tokens."""

    method: str = "auto"
    draft_model: str | None = None  # a folder on rank 0 (absolute, or from the file's folder) or a hub id
    max_draft_tokens: int = 8

    @property
    def is_on(self) -> bool:
        """Whether anything is guessed."""
        return self.method != "off"

    @property
    def has_ngrams(self) -> bool:
        """Whether what came before in a text is taken to come again."""
        return self.method in ("auto", "ngram")

    @property
    def drafter(self) -> str | None:
        """The draft model that rank 0 loads; None: none."""
        return self.draft_model if self.method in ("auto", "draft") else None


def read_speculation(table: Table, model: str) -> SpeculationConfig:
    """`model`: the configured one, which cannot draft for itself. Raises ConfigError."""
    method = table.take_choice("method", METHODS, "auto")
    draft_model = table.take_str("draft_model")
    max_draft_tokens = table.take_int("max_draft_tokens", 1, MAX_DRAFT_TOKENS, default=8)
    assert max_draft_tokens is not None
    if method == "draft" and draft_model is None:
        raise table.error(
            "draft_model",
            'must name a folder or a hub id where the method is "draft": a small model with the '
            "vocabulary of the big one",
        )
    if draft_model == model:
        raise table.error("draft_model", "is the model itself: name a smaller one with its vocabulary")
    return SpeculationConfig(method, draft_model, max_draft_tokens)
