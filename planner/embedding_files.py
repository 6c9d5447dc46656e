"""What a checkpoint says of itself where it is an embedding model, in the layout of sentence-transformers.

`modules.json` names what a text passes through: the transformer, a pooling of its hidden states, and maybe a
normalisation (sbert.net/docs/package_reference/sentence_transformer/models.html). Pure but for small files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.headers import read_config

MODULES = "modules.json"
LAST, MEAN, FIRST = "lasttoken", "mean", "cls"
_KINDS = (LAST, MEAN, FIRST)
_FLAGS = {"mean_tokens": MEAN, "cls_token": FIRST}  # pooling_mode_..., where it is called otherwise


class NoEmbeddingsError(ValueError):
    """The model gives no embeddings; one sentence that says why, and what to do."""


@dataclass(frozen=True, slots=True)
class EmbeddingModel:
    """How a text becomes a vector of `width` numbers."""

    pooling: str  # LAST, MEAN or FIRST
    width: int
    is_normalised: bool  # to length 1
    max_tokens: int | None = None  # of a text; None: as many as the context has
    prefix: str = ""  # which goes before each text
    is_lowered: bool = False  # texts are written in small letters first


def is_embedding_model(model_dir: Path) -> bool:
    """Whether the folder says so, readable or not."""
    return (model_dir / MODULES).is_file()


def read_embedding_model(model_dir: Path) -> EmbeddingModel:
    """What the folder's files say. Raises NoEmbeddingsError, ModelFilesError for a wrong config.json."""
    if not is_embedding_model(model_dir):
        raise NoEmbeddingsError(
            f"its files have no {MODULES}, by which an embedding model says how its vectors are made: serve "
            "an embedding model such as Qwen/Qwen3-Embedding-0.6B, or, where this is a conversion of one, "
            f"copy {MODULES} and 1_Pooling/config.json from the original into its folder on every node"
        )
    _refuse_other_attention(read_config(model_dir))
    kinds = _modules(model_dir)
    names = [kind for kind, _ in kinds]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        raise NoEmbeddingsError(
            f"its {MODULES} names {', '.join(names) or 'nothing'}, and only Transformer, Pooling and "
            "Normalize, in this order, can be served: serve another embedding model"
        )
    place = f"{kinds[1][1]}/config.json"
    pooling = _read(model_dir, place)
    width = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension"))
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise NoEmbeddingsError(f"its {place} has no word_embedding_dimension: download the model again")
    settings = _read(model_dir, "sentence_bert_config.json", is_needed=False)
    most = settings.get("max_seq_length")
    prefix = _prefix(_read(model_dir, "config_sentence_transformers.json", is_needed=False))
    if prefix and pooling.get("include_prompt") is False:
        raise NoEmbeddingsError(
            f"its {place} leaves the default prompt out of the pooling, which cannot be served: serve "
            "another embedding model"
        )
    return EmbeddingModel(
        pooling=_pooling_kind(pooling, place),
        width=width,
        is_normalised="Normalize" in names,
        max_tokens=most if isinstance(most, int) and most > 0 else None,
        prefix=prefix,
        is_lowered=settings.get("do_lower_case") is True,
    )


def _refuse_other_attention(config: Mapping[str, Any]) -> None:
    """Tokens that see those after them cannot be read in parts, and mlx-lm's models have none."""
    name = None
    if config.get("is_causal") is False:
        name = "is_causal = false"
    elif config.get("use_bidirectional_attention"):
        name = "use_bidirectional_attention"
    elif "AutoModel" in (config.get("auto_map") or {}):
        name = "auto_map, code of its own for its layers"
    if name is not None:
        raise NoEmbeddingsError(
            f"its config.json has {name}, so that its vectors are not those of mlx-lm's layers, in which a "
            "token sees only those before it: serve another embedding model"
        )


def _modules(model_dir: Path) -> list[tuple[str, str]]:
    """The class and the folder of each module, in order."""
    try:
        modules = json.loads((model_dir / MODULES).read_text(encoding="utf-8"))
        return [(str(one["type"]).rpartition(".")[2], str(one["path"])) for one in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoEmbeddingsError(
            f"its {MODULES} cannot be read ({error}): download the model again"
        ) from error


def _pooling_kind(pooling: Mapping[str, Any], place: str) -> str:
    """As a name, or as one flag for each kind."""
    kinds = [
        _FLAGS.get(mode := key.removeprefix("pooling_mode_"), mode)
        for key, value in pooling.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    named = pooling.get("pooling_mode")
    if named is not None:
        kinds = [str(kind) for kind in named] if isinstance(named, list) else [str(named)]
    if len(kinds) != 1 or kinds[0] not in _KINDS:
        raise NoEmbeddingsError(
            f"its {place} asks for the pooling {' and '.join(kinds) or 'of nothing'}, and only one of "
            f"{', '.join(_KINDS)} can be served: serve another embedding model"
        )
    return kinds[0]


def _prefix(settings: Mapping[str, Any]) -> str:
    """The text of the default prompt; empty where there is none."""
    prompts, name = settings.get("prompts"), settings.get("default_prompt_name")
    return str(prompts.get(name, "")) if isinstance(prompts, dict) and name is not None else ""


def _read(model_dir: Path, name: str, *, is_needed: bool = True) -> dict[str, Any]:
    try:
        content = json.loads((model_dir / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not is_needed:
            return {}
        raise NoEmbeddingsError(
            f"its {MODULES} names {name}, which is not there: download the model again, or copy that file "
            "from the original into its folder on every node"
        ) from None
    except (OSError, ValueError) as error:
        raise NoEmbeddingsError(f"its {name} cannot be read ({error}): download the model again") from error
    return content if isinstance(content, dict) else {}
