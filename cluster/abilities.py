"""What the ring's model can be asked for: text, and vectors of texts. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from planner.embedding_files import NoEmbeddingsError, read_embedding_model
from planner.model_profile import ModelProfile
from proto import ring_pb2


@dataclass(frozen=True, slots=True)
class Abilities:
    """Why the model cannot do a thing, as a sentence; empty where it can."""

    why_no_text: str = ""
    why_no_vectors: str = "the ring has not said that its model gives embeddings"

    def check(self, sampling: ring_pb2.Sampling) -> None:
        """Raises ValueError for a request that asks for what the model cannot do."""
        why = self.why_no_vectors if sampling.pooling.kind else self.why_no_text
        if why:
            raise ValueError(why)


class HiddenProver(Protocol):
    """Tries an architecture, as `cluster.proof.Prover`."""

    def why_no_hidden(self) -> str:
        """Why hidden states before the head cannot be had; empty where they can."""


def abilities_of(model: ModelProfile, model_dir: Path, prover: HiddenProver) -> Abilities:
    """Of the model in `model_dir`. prover: asked of embedding models alone."""
    no_text = (
        ""
        if model.has_head
        else f"{model.name} is an embedding model without a head, so it writes no text: ask /v1/embeddings"
    )
    try:
        read_embedding_model(model_dir)
    except NoEmbeddingsError as error:
        return Abilities(no_text, f"{model.name} gives no embeddings: {error}")
    why = prover.why_no_hidden()
    if not why:
        return Abilities(no_text, "")
    return Abilities(
        no_text,
        f"{model.name} gives no embeddings: what the architecture {model.model_type} gives its head cannot "
        f"be had ({why}); serve an embedding model of another architecture",
    )
