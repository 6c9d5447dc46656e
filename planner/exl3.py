"""EXL3 (trellis) checkpoints by their headers: which tensors belong together, and what they stand for. Pure.

A weight `P.weight` of (out, in) is kept as P.trellis, P.suh and P.svh (P.su and P.sv in older files) with
P.mcg or P.mul1; kernels.exl3_reference says what is in them. Here such a group becomes one header of the
dtype "EXL3-K", so that the rest of the planner sees a matrix.
Format: https://github.com/turboderp-org/exllamav3/blob/master/doc/exl3.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

from planner.headers import UNIFORM_GRID, ModelFilesError, TensorHeader
from planner.kv_profile import HEADS_KEYS, KV_HEADS_KEYS, first_int, head_dim

METHOD = "exl3"
DTYPE = "EXL3-"
LEAVES = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")
CODEBOOK_LEAVES = ("mcg", "mul1")
BLOCK, TILE = 128, 16
# What kernels.exl3_ops takes beside the weights: for each weight that is decoded at once (words, indices,
# states, the number twice), and for each input of a row in float32 (padded, scaled, rotated).
DECODED_WEIGHTS, DECODED_BYTES = 1 << 20, 34
ROTATED_BYTES = 12
MAX_BITS = 8


def is_exl3(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the weights are EXL3's."""
    return any(found.get("quant_method") == METHOD for found in _quantizations(config))


def exl3_bits(config: Mapping[str, Any]) -> Any:
    """What config.json says of the bits of its EXL3 weights; None: nothing."""
    return next((f.get("bits") for f in _quantizations(config) if f.get("quant_method") == METHOD), None)


def paths(names: Iterable[str]) -> list[str]:
    """What EXL3 weights there are, by the name without its last part, in the order of `names`."""
    found = (name.rpartition(".") for name in names)
    return list(dict.fromkeys(path for path, _, leaf in found if leaf in LEAVES[:3]))


def refusal(config: Mapping[str, Any], names: Iterable[str], model: str) -> str:
    """Why a checkpoint that looks like this one cannot be read: one sentence that says what to do, or ""."""
    names = set(names)
    methods = [str(found.get("quant_method", "")) for found in _quantizations(config)]
    if any(method.startswith("trellis") for method in methods) or any(map(_is_uniform, names)):
        return UNIFORM_GRID.format(model)
    found = paths(names)
    if not found and METHOD in methods:
        return f"{model}: config.json says exl3, but no tensor is a trellis: download the model again"
    for path in found:
        for leaves in (("trellis",), ("suh", "su"), ("svh", "sv")):
            if not any(f"{path}.{leaf}" in names for leaf in leaves):
                return f"{model}: the checkpoint lacks tensor '{path}.{leaves[0]}': download the model again"
        if f"{path}.mcg" in names and f"{path}.mul1" in names:
            return f"{model}: {path} names two codebooks, mcg and mul1: download the model again"
        if f"{path}.weight" in names:
            return f"{model}: {path} is there twice, as weight and as trellis: download the model again"
    return ""


def fold(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader], model: str
) -> dict[str, TensorHeader]:
    """`headers` with one for each EXL3 weight, in the place of its trellis; without any, a copy.

    nbytes are those in memory; shapes are padded. Raises ModelFilesError for a checkpoint that is not read.
    """
    if reason := refusal(config, headers, model):
        raise ModelFilesError(reason)
    found = set(paths(headers))
    folded: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        path, _, leaf = name.rpartition(".")
        if path not in found or leaf not in LEAVES:
            folded[name] = header
        elif leaf == "trellis":
            folded[f"{path}.weight"] = _folded(header, path, headers, model)
    return folded


def unpadded(flat: Mapping[str, Any], layer: Mapping[str, TensorHeader]) -> dict[str, tuple[int, int]]:
    """Shapes of a layer's keys and values without padding, where config.json tells their heads.

    flat: config.json, its text part on top. layer: folded headers, by the name after the layer's index.
    """
    heads = first_int(flat, KV_HEADS_KEYS, first_int(flat, HEADS_KEYS))
    rows = heads * head_dim(flat)
    return {
        rest: (rows, header.shape[1])
        for rest, header in layer.items()
        if bits_of(header.dtype)
        and rest.endswith(("k_proj.weight", "v_proj.weight"))
        and header.shape[0] == -(-rows // BLOCK) * BLOCK
    }


def bits_of(dtype: str) -> int:
    """K of a folded header; 0 for any other."""
    return int(dtype.removeprefix(DTYPE)) if dtype.startswith(DTYPE) else 0


def told(headers: Iterable[TensorHeader]) -> str:
    """How many bits folded weights have, as "2.97 bits a weight (40 tensors of 2, 120 of 3)"; "" for none."""
    counts: Counter[int] = Counter()
    count = nbytes = 0
    for header in headers:
        if bits := bits_of(header.dtype):
            counts[bits] += 1
            count += prod(header.shape)
            nbytes += header.nbytes
    if not count:
        return ""
    kinds = [f"{number} of {bits}" for bits, number in sorted(counts.items())]
    kinds[0] = kinds[0].replace(" of ", " tensors of ")
    return f"{8 * nbytes / count:.2f} bits a weight ({', '.join(kinds)})"


def _folded(
    trellis: TensorHeader, path: str, headers: Mapping[str, TensorHeader], model: str
) -> TensorHeader:
    """The matrix that a trellis and its scales stand for. Raises ModelFilesError for shapes that are none."""
    shape = trellis.shape
    bits, rest = divmod(shape[-1] if len(shape) == 3 else 0, TILE)
    if trellis.dtype not in ("I16", "U16") or rest or not 1 <= bits <= MAX_BITS:
        raise ModelFilesError(
            f"{model}: {trellis.name} is {trellis.dtype} {list(shape)}; EXL3 is read in int16 and whole bits "
            f"from 1 to {MAX_BITS}: take another revision of the model"
        )
    num_in, num_out = shape[0] * TILE, shape[1] * TILE
    for size, leaves in ((num_in, ("suh", "su")), (num_out, ("svh", "sv"))):
        scale = next(headers[f"{path}.{leaf}"] for leaf in leaves if f"{path}.{leaf}" in headers)
        own = prod(scale.shape) * (TILE if scale.name.endswith((".su", ".sv")) else 1)
        if own != size or size % BLOCK:
            raise ModelFilesError(
                f"{model}: {scale.name} has {own} channels, its trellis {size}, and EXL3 has a multiple of "
                f"{BLOCK}: download the model again"
            )
    return replace(
        trellis,
        name=f"{path}.weight",
        dtype=f"{DTYPE}{bits}",
        shape=(num_out, num_in),
        nbytes=trellis.nbytes + 2 * (num_in + num_out),
    )


def _is_uniform(name: str) -> bool:
    return name.endswith((".indices", "__indices", ".trellis_indices"))


def _quantizations(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "quantization"):
            found = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(found, Mapping):
                yield found
