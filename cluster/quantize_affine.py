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
from cluster.quantize_card import card
from cluster.quantize_parts import FILE_BYTES, SETTINGS, claimed, copy_others, others_bytes
from cluster.quantize_source import Source
from planner.sizes import size

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
    with claimed(output) as partial:
        if (partial / SETTINGS).exists():
            raise UserError(
                f"{partial} holds a stopped EXL3 run: repeat that one's command, remove the folder, or name "
                "another --output",
                EXIT_USAGE,
            )
        with contextlib.redirect_stdout(io.StringIO()):  # what mlx-lm says belongs to nobody who reads --json
            model, config = quantize_model(model, source.plain_config, group_size, bits)
        options = f"--format affine --bits {bits} --group-size {group_size}"
        text = card(source, f"affine, {bits} bits", options, ["mlx", f"{bits}-bit"])
        return _written(source, model, config, partial / "model", output, text=text)


def _written(
    source: Source, model: nn.Module, config: dict[str, Any], folder: Path, output: Path, *, text: str
) -> Affine:
    """folder: beside the output on its disk; what a killed run left there goes. text: the README.md."""
    shutil.rmtree(folder, ignore_errors=True)
    found = _measured(model)
    needed_bytes = found.total_bytes + others_bytes(source.folder, text) + FILE_BYTES
    try:
        folder.mkdir()
        _check_room(output.parent, needed_bytes)
        save_model(folder, model)
        save_config(config, folder / "config.json")
        copy_others(source.folder, folder, text)
        os.replace(folder, output)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            _check_room(output.parent, needed_bytes)
        raise UserError(f"{output} cannot be written ({error}): name another --output") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"the result takes {size(needed_bytes)} and {folder} has {size(free)} free, "
            f"{size(needed_bytes - free)} are missing: make room and repeat the command, or name an --output "
            "on another disk",
            EXIT_DOES_NOT_FIT,
        )


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
