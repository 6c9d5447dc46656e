"""A draft model without training: a checkpoint with some of its layers left out, which still guesses much."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")


def write_pruned(model_dir: Path, folder: Path, layers: Sequence[int]) -> Path:
    """The model of `model_dir` with these of its layers alone, in `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((model_dir / "config.json").read_text()) | {"num_hidden_layers": len(layers)}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(model_dir / name, folder)
    kept = {}
    for file in sorted(model_dir.glob("*.safetensors")):
        for name, array in cast("dict[str, mx.array]", mx.load(str(file))).items():
            match = _LAYER.fullmatch(name)
            if match is None:
                kept[name] = array
            elif int(match[2]) in layers:
                kept[f"{match[1]}{layers.index(int(match[2]))}{match[3]}"] = array
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "mlx"})
    return folder
