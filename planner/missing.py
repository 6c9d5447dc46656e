"""What the tensors of a missing file must look like, from their siblings: one lost file of many need not keep
the nodes that own nothing of it from working.

Reads headers as planner.headers does; no state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from planner.headers import ModelFilesError, TensorHeader, read_checkpoint

_HEADS = ("lm_head", "embed_out", "output", "unembed")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embeddings", "embedding", "embed_in")


def known_headers(model_dir: Path) -> dict[str, TensorHeader]:
    """`planner.headers.read_headers`, with the tensors of missing files as their siblings are.

    Raises ModelFilesError as that does, and for a missing file whose tensors have no siblings.
    """
    checkpoint = read_checkpoint(model_dir)
    headers = dict(checkpoint.headers)
    for file, tensors in checkpoint.missing.items():
        for tensor in tensors:
            sibling = _sibling(tensor, checkpoint.headers)
            if sibling is None:
                raise ModelFilesError(
                    f"{model_dir / file} is missing, and nothing else tells the shape of its {tensor}: "
                    "download the model again"
                )
            headers[tensor] = replace(sibling, name=tensor, file=file, start=0)
    return headers


def missing_tensors(model_dir: Path) -> dict[str, TensorHeader]:
    """Those of `known_headers` whose file is missing."""
    missing = read_checkpoint(model_dir).missing
    if not missing:
        return {}
    headers = known_headers(model_dir)
    return {tensor: headers[tensor] for tensors in missing.values() for tensor in tensors}


def _sibling(tensor: str, headers: Mapping[str, TensorHeader]) -> TensorHeader | None:
    """The same tensor of the nearest other layer or expert; the embedding of a head; a norm of a norm."""
    pattern, numbers = _pattern(tensor)
    alike = [(name, header) for name, header in headers.items() if _pattern(name)[0] == pattern]
    if alike:
        return min(
            alike,
            key=lambda item: [abs(a - b) for a, b in zip(_pattern(item[0])[1], numbers, strict=True)],
        )[1]
    path, _, leaf = tensor.rpartition(".")
    module = path.rpartition(".")[2]
    for own, others in ((_HEADS, _EMBEDDINGS), (_EMBEDDINGS, _HEADS)):
        if module in own:
            return next((h for h in headers.values() if _is_of(h.name, others, leaf)), None)
    if "norm" in module or module == "ln_f":
        return next((h for h in headers.values() if _is_layer_norm(h, leaf)), None)
    return None


def _pattern(name: str) -> tuple[str, list[int]]:
    """The name without the numbers that are whole components of it, and those."""
    parts = name.split(".")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return ".".join("#" if part.isdecimal() else part for part in parts), numbers


def _is_of(name: str, modules: tuple[str, ...], leaf: str) -> bool:
    path, _, own_leaf = name.rpartition(".")
    return own_leaf == leaf and path.rpartition(".")[2] in modules


def _is_layer_norm(header: TensorHeader, leaf: str) -> bool:
    """A norm of a layer's whole hidden state, not of its heads."""
    path, _, own_leaf = header.name.rpartition(".")
    module = path.rpartition(".")[2]
    is_norm = "norm" in module or module == "ln_1"
    return (
        is_norm and own_leaf == leaf and len(header.shape) == 1 and not module.startswith(("q_", "k_", "kv_"))
    )
