"""`macrame quantize --format exl3`: a model folder into EXL3, one layer after the other, resumable.

The calibration text is read once by the model whose linears are taps (quantize_taps.py); each layer
becomes a part on disk (quantize_parts.py) before the next is begun. What a layer becomes is a function of
its weight, its inputs and its name alone, so a run that was killed gives the bytes of one that was not.
Main thread only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from numpy.typing import NDArray

from cluster.errors import EXIT_USAGE, UserError
from cluster.quantize_card import card
from cluster.quantize_parts import Parts, Tensors
from cluster.quantize_source import Source
from cluster.quantize_taps import HEAD, Floats, install_taps, is_wanted
from cluster.versions import macrame_version
from kernels.exl3_encode import encode_tiles
from kernels.exl3_encode_linear import Encoded, Search, encode_linear
from kernels.exl3_reference import BLOCK, Codebook, dense

CODEBOOK: Codebook = "mcg"
MCG_MULTIPLIER = 0xCBAC1FED
_STACKS = ("switch_mlp", "switch_glu", "experts")
_OTHER_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # as Mixtral's checkpoints have them


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight that becomes EXL3. path: its name in the output, without the last part. shape: (out, in)."""

    path: str
    shape: tuple[int, int]
    bits: int

    @property
    def num_weights(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What EXL3 stores of it."""
        wide, tall = (-(-size // BLOCK) * BLOCK for size in self.shape)
        return wide * tall * self.bits // 8 + 2 * (wide + tall) + 4


def choose_layers(
    model: nn.Module, headers: Mapping[str, Any], bits: Fraction, head_bits: int
) -> dict[str, Layer]:
    """The layers that are quantised, by the name their tap has, in the model's order.

    A whole number of bits is each layer's; another is met by a mix of the two whole numbers around it, spread
    evenly over the model's weights. The experts that are computed together have the same: exllamav3 loads no
    others, and neither it nor the kernels here have a product for them. The head has its own.
    """
    layers: dict[str, Layer] = {}
    owed = Fraction(0)
    low = bits.numerator // bits.denominator
    for path, module in model.named_modules():
        if not is_wanted(path, module):
            continue
        experts: list[int | None] = (
            list(range(module.weight.shape[0])) if isinstance(module, SwitchLinear) else [None]
        )
        names = [name for expert in experts if (name := name_in(headers, path, expert)) is not None]
        shape = tuple(module.weight.shape[-2:])
        own = head_bits
        if path.rpartition(".")[2] != HEAD:
            num_weights = len(names) * prod(shape)
            owed += (bits - low) * num_weights
            is_more = owed * 2 >= num_weights and bits != low
            own = low + is_more
            owed -= is_more * num_weights
        layers |= {name: Layer(name, (shape[0], shape[1]), own) for name in names}
    return layers


def name_in(headers: Mapping[str, Any], path: str, expert: int | None) -> str | None:
    """What EXL3 calls a module's weight, by what the source calls it; None for a name that is not found."""
    if expert is None:
        bare = path.removeprefix("language_model.")
        names = (path, bare, f"model.language_model.{bare.removeprefix('model.')}")
        return next((name for name in names if f"{name}.weight" in headers), None)
    parent, _, leaf = path.rpartition(".")
    above, _, stack = parent.rpartition(".")
    if stack not in _STACKS:
        return None
    single = f"{above}.experts.{expert}"
    other = f"{single}.{_OTHER_NAMES.get(leaf, leaf)}"
    if f"{other}.weight" in headers and f"{single}.{leaf}.weight" not in headers:
        return other
    if f"{path}.weight" in headers or f"{single}.{leaf}.weight" in headers:
        return f"{single}.{leaf}"
    return None


def unnamed(model: nn.Module, headers: Mapping[str, Any]) -> list[str]:
    """The layers that stay as they are because the checkpoint calls, or keeps, their weights otherwise."""
    return [
        path
        for path, module in model.named_modules()
        if is_wanted(path, module)
        and name_in(headers, path, 0 if isinstance(module, SwitchLinear) else None) is None
    ]


def make_search() -> Search:
    """The search for tiles on this machine: its GPU's where it has one, else NumPy's."""
    if mx.default_device() == mx.gpu:
        from kernels.exl3_encode_mlx import encode_tiles as on_gpu

        return on_gpu
    return encode_tiles


@dataclass(frozen=True, slots=True)
class Quantised:
    """What a run did. losses: by layer, of those that this run encoded itself."""

    total_bytes: int
    num_resumed: int
    losses: Mapping[str, float]


def quantize_exl3(
    source: Source,
    model: nn.Module,
    layers: Mapping[str, Layer],
    rows: NDArray[np.int32],
    parts: Parts,
    *,
    config: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> Quantised:
    """rows: (num_rows, num_columns) token ids. progress: (weights done, weights in all). Raises UserError."""
    search = make_search()
    losses: dict[str, float] = {}
    total = sum(layer.num_weights for layer in layers.values())
    done: dict[str, int] = {}
    kept = kept_tensors(source, model, layers)

    def quantise(name: str, weight: Callable[[], Floats], inputs: Callable[[], Floats] | None) -> Floats:
        layer = layers[name]
        found = parts.find(name)
        if found is None:
            try:
                encoded = encode_linear(
                    weight(), inputs() if inputs else None, layer.bits, CODEBOOK,
                    seed=zlib.crc32(name.encode()), search=search,
                )  # fmt: skip
            except ValueError as error:
                raise UserError(f"{name} cannot be quantised: {error}", EXIT_USAGE) from None
            losses[name] = encoded.loss
            found = _tensors(name, encoded)
            parts.write(name, found)
        done[name] = layer.num_weights
        progress(sum(done.values()), total)
        return _decoded(name, layer, found)

    taps = install_taps(model, quantise, lambda path, expert: name_in(source.headers, path, expert))
    progress(0, total)
    model(mx.array(rows.astype(np.int32)))  # taps evaluate what they are given; logits are not wanted
    for tap in taps:
        tap.finish()
    nbytes = parts.assemble(layers, kept, config, source.folder, _card(source, config["quantization_config"]))
    return Quantised(nbytes, len(layers) - len(losses), losses)


def _tensors(name: str, encoded: Encoded) -> Tensors:
    multiplier = np.array(MCG_MULTIPLIER, np.uint32).view(np.int32)
    arrays: dict[str, Any] = {
        "trellis": encoded.trellis,
        "suh": encoded.suh,
        "svh": encoded.svh,
        "mcg": multiplier,
    }
    return {f"{name}.{leaf}": mx.array(array) for leaf, array in arrays.items()}


def _decoded(name: str, layer: Layer, tensors: Tensors) -> Floats:
    trellis, suh, svh = (np.array(tensors[f"{name}.{leaf}"]) for leaf in ("trellis", "suh", "svh"))
    out, inner = layer.shape
    return dense(trellis, suh, svh, CODEBOOK)[:out, :inner].astype(np.float32)


def kept_tensors(source: Source, model: nn.Module, layers: Mapping[str, Layer]) -> list[tuple[str, mx.array]]:
    """The tensors that stay as they are: a plain source's own, an affine one's as the model has them."""
    weights: dict[str, mx.array] = {}
    if source.affine is not None:
        weights = dict(tree_flatten(model.parameters()))
    else:
        for file in sorted({header.file for header in source.headers.values()}):
            weights |= mx.load(str(source.folder / file))  # type: ignore[arg-type]
    stacked = {name.rpartition(".experts.")[0] for name in layers if ".experts." in name}
    kept = []
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        base, _, stack = path.rpartition(".")[0].rpartition(".")
        is_stack = stack in _STACKS and base in stacked and array.ndim == 3
        if not (leaf == "weight" and (path in layers or is_stack)):
            kept.append((name, array))
    return kept


def _card(source: Source, quantisation: Mapping[str, Any]) -> str:
    bits, head_bits = quantisation["bits"], quantisation["head_bits"]
    options = f"--format exl3 --bits {bits} --head-bits {head_bits}"
    return card(source, f"EXL3, {bits} bits", options, ["exl3", f"{bits}-bit"])


def exl3_config(source: Source, bits: Fraction, head_bits: int, rows: tuple[int, int]) -> dict[str, Any]:
    """config.json of the output, with what exllamav3's converter writes about the quantisation."""
    shown = bits.numerator if bits.denominator == 1 else float(bits)
    quantisation: dict[str, Any] = {
        "quant_method": "exl3",
        "version": f"macrame {macrame_version()}",
        "bits": shown,
        "head_bits": head_bits,
        "calibration": {"rows": rows[0], "cols": rows[1]},
        "out_scales": "always",
        "codebook": CODEBOOK,
    }
    return source.plain_config | {"quantization_config": quantisation}
