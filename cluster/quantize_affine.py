"""`macrame quantize --format affine`: MLX's own quantisation, in a folder that mlx-lm loads. Main thread
only.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save_config, save_model

from cluster.errors import EXIT_DOES_NOT_FIT, EXIT_USAGE, UserError
from cluster.quantize_parts import copy_others
from cluster.quantize_source import Source

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Affine:
    """What was written. bits_per_weight: of the layers that were quantised, with their scales."""

    total_bytes: int
    bits_per_weight: float
    num_layers: int


def quantize_affine(source: Source, model: nn.Module, bits: int, group_size: int, output: Path) -> Affine:
    """Raises UserError where the output is there, or cannot be written."""
    if output.exists():
        raise UserError(f"{output} is there already: remove it, or name another --output", EXIT_USAGE)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):  # what mlx-lm says belongs to nobody who reads --json
        model, config = quantize_model(model, source.plain_config, group_size, bits)
    try:
        partial.mkdir(parents=True)
        found = _measured(model)
        free = shutil.disk_usage(partial).free
        if free < found.total_bytes:
            partial.rmdir()
            raise UserError(
                f"the result takes {found.total_bytes / 1e9:.1f} GB and {output.parent} has {free / 1e9:.1f} "
                "GB free: make room, or name an --output on another disk",
                EXIT_DOES_NOT_FIT,
            )
        save_model(partial, model)
        save_config(config, partial / "config.json")
        copy_others(source.folder, partial)
        os.replace(partial, output)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{output} cannot be written ({error}): make room, or name another --output"
        ) from None
    return found


def _measured(model: nn.Module) -> Affine:
    weights: Mapping[str, Any] = dict(tree_flatten(model.parameters()))
    quantised = [name.removesuffix(".scales") for name in weights if name.endswith(".scales")]
    stored = sum(
        weights[f"{path}.{leaf}"].nbytes
        for path in quantised
        for leaf in ("weight", "scales", "biases")
        if f"{path}.{leaf}" in weights
    )
    modules = dict(model.named_modules())
    count = sum(weights[f"{path}.weight"].size * 32 // modules[path].bits for path in quantised)
    total = sum(array.nbytes for array in weights.values())
    return Affine(total, 8 * stored / count if count else 0.0, len(quantised))
