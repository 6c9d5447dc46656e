"""Which tensors of a checkpoint are layers, embedding, head or neither, and which mlx-lm drops.

Pure, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.headers import ModelFilesError, TensorHeader

# Parts of multimodal and draft models that mlx-lm's text models drop.
_DROPPED = (
    *("vision", "visual", "audio", "mtp", "multi_modal_projector", "mm_projector", "patch_merge"),
    "image_newline",
)
_DROPPED_LEAVES = (
    "rotary_emb.inv_freq",
    "rotary_pos_emb.inv_freq",
    "attn.masked_bias",
    "attention.masked_bias",
)
_LAYER_LISTS = ("layers", "h", "blocks", "block", "layer")
HEADS = ("lm_head", "embed_out", "output", "head", "unembed", "unembedding")


@dataclass(frozen=True, slots=True)
class Parts:
    """A checkpoint's tensors, taken apart."""

    layers: tuple[dict[str, TensorHeader], ...]  # each by the name after the layer's index
    embed: tuple[TensorHeader, ...]
    head: tuple[TensorHeader, ...]
    other: tuple[TensorHeader, ...]  # the final norm, and what else stands outside the layers


def split_parts(headers: Mapping[str, TensorHeader], num_layers: int | None, name: str) -> Parts:
    """The parts of the model called `name`. `num_layers` None: as many as there are.

    Raises ModelFilesError where there are no layers, or fewer than `num_layers`.
    """
    layers, rest = _split_layers(
        {tensor: header for tensor, header in headers.items() if not _is_dropped(tensor)}, num_layers, name
    )
    embed, head, other = _split_rest(rest)
    return Parts(tuple(layers), tuple(embed), tuple(head), tuple(other))


def _split_layers(
    headers: Mapping[str, TensorHeader], num_layers: int | None, name: str
) -> tuple[list[dict[str, TensorHeader]], list[TensorHeader]]:
    """The tensors of each layer, by the name after its index, and all others.

    The layers are the numbered group with the most bytes; what is numbered beyond `num_layers` is dropped.
    """
    groups: dict[str, dict[int, dict[str, TensorHeader]]] = {}
    rest: list[TensorHeader] = []
    for header in headers.values():
        parts = header.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            rest.append(header)
        else:
            group = groups.setdefault(".".join(parts[:at]), {})
            group.setdefault(int(parts[at]), {})[".".join(parts[at + 1 :])] = header
    if not groups:
        raise ModelFilesError(f"{name} has no numbered layers: it is no model that can be split")
    order = sorted(groups, key=lambda key: (not _looks_like_layers(key), -_group_bytes(groups[key])))
    layers = _in_order(groups[order[0]])
    for key in order[1:]:
        more = _in_order(groups[key])
        if (
            num_layers is not None
            and len(layers) + len(more) == num_layers
            and key.split(".")[-1].endswith("layers")
        ):
            layers += more  # two lists that the model joins
        else:
            rest += [header for layer in more for header in layer.values()]
    if num_layers is not None and len(layers) < num_layers:
        raise ModelFilesError(
            f"{name} has tensors for {len(layers)} layers, its config.json names {num_layers}"
        )
    layers = layers[:num_layers]
    missing = [index for index, layer in enumerate(layers) if not layer]
    if missing:
        raise ModelFilesError(f"{name} has no tensors for layer {missing[0]}: download the model again")
    return layers, rest


def _looks_like_layers(prefix: str) -> bool:
    return prefix.rsplit(".", 1)[-1] in _LAYER_LISTS


def _group_bytes(group: Mapping[int, Mapping[str, TensorHeader]]) -> int:
    return sum(header.nbytes for layer in group.values() for header in layer.values())


def _in_order(group: Mapping[int, dict[str, TensorHeader]]) -> list[dict[str, TensorHeader]]:
    return [group.get(index, {}) for index in range(max(group) + 1)]


def _split_rest(
    rest: Iterable[TensorHeader],
) -> tuple[list[TensorHeader], list[TensorHeader], list[TensorHeader]]:
    """Embedding, head, and what else stands outside the layers."""
    embed, head, other = [], [], []
    for header in rest:
        path = header.name.rsplit(".", 1)[0] if "." in header.name else header.name
        leaf = path.rsplit(".", 1)[-1]
        if leaf in HEADS:
            head.append(header)
        elif _is_table(path) and "norm" not in leaf:
            embed.append(header)
        else:
            other.append(header)
    return embed, head, other


def _is_table(path: str) -> bool:
    """Read where tokens come in: embeddings, those of n-grams, and what makes streams of them."""
    leaf = path.rsplit(".", 1)[-1]
    return "emb" in leaf or leaf in ("wte", "wpe") or "ngram_embedding" in path or "altup_projections" in path


def _is_dropped(tensor: str) -> bool:
    parts = tensor.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    is_tower = any(part.startswith(_DROPPED) for part in parts[:at])
    return is_tower or tensor.endswith(_DROPPED_LEAVES)
