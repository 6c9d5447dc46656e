"""Tiny checkpoints that say that they are embedding models, and what plain mlx-lm gives for their texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from tests.tiny_models import EOS_ID, SPECIALS, build, tiny_config, write_checkpoint

_FLAGS = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}


def write_embedding_files(
    folder: Path, pooling: str = "lasttoken", *, width: int = 64, is_normalised: bool = True
) -> Path:
    """What sentence-transformers writes beside the weights."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if is_normalised else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    flags = {f"pooling_mode_{flag}": kind == pooling for kind, flag in _FLAGS.items()}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    content = {"word_embedding_dimension": width, "pooling_mode_max_tokens": False, **flags}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return folder


def end_texts(folder: Path) -> Path:
    """Its tokenizer ends each text with an end-of-text token, as Qwen3-Embedding's does."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    end: dict[str, Any] = {"SpecialToken": {"id": SPECIALS[1], "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, end, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {SPECIALS[1]: {"id": SPECIALS[1], "ids": [EOS_ID], "tokens": [SPECIALS[1]]}},
    }
    path.write_text(json.dumps(content, ensure_ascii=False))
    return folder


def write_embedding_model(
    arch: str,
    folder: Path,
    *,
    num_layers: int = 5,
    pooling: str = "lasttoken",
    is_normalised: bool = True,
    has_head: bool = True,
    is_bare: bool = False,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint with these files. is_bare: its tensors have the names that the inner part alone has."""
    write_checkpoint(arch, folder, num_layers=num_layers, overrides=overrides)
    if is_bare or not has_head:
        file = str(folder / "model.safetensors")
        weights: dict[str, Any] = dict(mx.load(file))  # type: ignore[arg-type]
        mx.eval(weights)
        kept = {name: array for name, array in weights.items() if has_head or not name.startswith("lm_head.")}
        kept = {name.removeprefix("model.") if is_bare else name: array for name, array in kept.items()}
        mx.save_safetensors(file, kept, {"format": "pt"})
    return end_texts(write_embedding_files(folder, pooling, is_normalised=is_normalised))


class PlainModel:
    """The same weights in plain mlx-lm: those of `write_embedding_model` with the same arguments."""

    def __init__(self, arch: str, num_layers: int = 5, overrides: dict[str, Any] | None = None) -> None:
        self.model: Any = build(tiny_config(arch, num_layers) | (overrides or {}))

    def hidden(self, tokens: Sequence[int], chunk: int) -> mx.array:
        """What the model gives its head for each token, (T, hidden_size); read so many at a time."""
        inner = self.model.model if hasattr(self.model, "model") else self.model.backbone
        cache, parts = make_prompt_cache(self.model), []
        for start in range(0, len(tokens), chunk):
            parts.append(inner(mx.array([tokens[start : start + chunk]]), cache=cache)[0])
            mx.eval(parts[-1], [c.state for c in cache])
        return mx.concatenate(parts)

    def vector(
        self,
        tokens: Sequence[int],
        chunk: int,
        *,
        pooling: str = "lasttoken",
        is_normalised: bool = True,
        dimensions: int | None = None,
    ) -> list[float]:
        """As an embedding."""
        hidden = self.hidden(tokens, chunk)
        if pooling == "mean":
            parts = [hidden[start : start + chunk].sum(axis=0) for start in range(0, len(tokens), chunk)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            vector = total / len(tokens)
        else:
            vector = hidden[0 if pooling == "cls" else -1]
        vector = vector[:dimensions]
        if is_normalised:
            vector = vector / mx.sqrt((vector * vector).sum())
        return [float(number) for number in np.array(vector)]
