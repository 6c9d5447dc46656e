"""What each part of a model weighs, from config.json and safetensors headers alone: no weight is read.

Bytes are those in memory after mlx-lm's `sanitize`: parts that it drops (vision and audio towers, layers
for multi-token prediction, rotary tables, a head that is tied) do not count, fp8 blocks that it widens
count as bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.carry_profile import carry_bytes
from planner.digests import digest_of
from planner.embedding_files import is_embedding_model
from planner.exl3 import (
    DECODED_BYTES,
    DECODED_WEIGHTS,
    ROTATED_BYTES,
    bits_of,
    fold,
    told,
    unpadded,
)
from planner.exl3_shapes import check_shapes
from planner.form_profile import Routing, layer_forms, matrix_form
from planner.forms import Form
from planner.headers import DTYPE_BITS, TensorHeader, read_config
from planner.kv_profile import (
    HEADS_KEYS,
    HIDDEN_KEYS,
    STATE_DTYPE_BYTES,
    cache_profile,
    cache_source,
    first_int,
    head_dim,
)
from planner.layer_profile import FormUse, LayerProfile, WeightFormat
from planner.load_options import LoadOptions
from planner.loaded_bytes import LoadedBytes
from planner.missing import known_headers
from planner.parts import split_parts
from planner.states import scratch_elements

NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")
CONTEXT_KEYS = (
    *("max_position_embeddings", "max_seq_len", "n_positions", "max_sequence_length", "n_ctx"),
    *("seq_length", "model_max_length"),
)
EXPERTS_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "n_experts")
TOP_K_KEYS = (
    *(
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_top_k",
        "moe_topk",
        "top_k_experts",
        "experts_per_token",
    ),
    *("moe_k", "num_selected_experts"),
)
NO_OPTIONS = LoadOptions()
# In the names of what gemma3n and gemma4 make every layer's extra input of, from the tokens, on each stage.
PER_LAYER = "per_layer"
NO_LIMIT_TOKENS = 1 << 20  # context of a model that names none, as recurrent ones do


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A whole model.

    Layers are in order; `embed_bytes` count once more for a last stage that needs a tied copy.
    """

    name: str  # as configured
    digest: str  # of config.json and headers, see planner.headers.model_digest
    model_type: str
    max_context: int  # tokens
    hidden_size: int
    vocab_size: int
    num_heads: int
    head_dim: int
    dtype_bytes: int  # of activations and caches
    layers: tuple[LayerProfile, ...]
    embed_bytes: int
    norm_bytes: int  # final norm, and what else follows the last layer
    head_bytes: int  # 0 where the head is tied to the embedding, or there is none
    is_tied: bool
    table_bytes: int = 0  # what the layers of every stage read besides their own tensors and the embedding
    shared_embed_bytes: int = 0  # of the embeddings: what every stage reads
    head_params: int = 0  # multiplied with one token, of the embedding where it is tied
    head_format: str = ""
    head_form: FormUse | None = None
    precision: str = ""  # of EXL3 weights, for a reader; empty: there are none
    cut_bytes: tuple[
        int, ...
    ] = ()  # (L + 1,) of one token at the cut before each layer; empty: one hidden state

    @property
    def carry_bytes(self) -> int:
        """What one token takes on the wire, at the cut where it takes most."""
        return max(self.cut_bytes, default=0) or self.hidden_size * self.dtype_bytes

    @property
    def forms(self) -> frozenset[Form]:
        """Of all blocks of experts and EXL3 matrices."""
        uses = [use for layer in self.layers for use in layer.forms]
        return frozenset(use.form for use in [*uses, *([self.head_form] if self.head_form else [])])

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def has_head(self) -> bool:
        """Whether it can write text: some embedding models come without what draws a token."""
        return self.is_tied or self.head_bytes > 0

    @property
    def full_bytes(self) -> int:
        """The whole model on one machine."""
        layers_bytes = sum(layer.weight_bytes for layer in self.layers)
        return layers_bytes + self.embed_bytes + self.norm_bytes + self.head_bytes + self.table_bytes


def read_model_profile(
    model_dir: Path, name: str | None = None, options: LoadOptions = NO_OPTIONS
) -> ModelProfile:
    """The profile of the checkpoint in `model_dir`. Raises ModelFilesError naming the file."""
    config, headers = read_config(model_dir), known_headers(model_dir)
    can_lack_head = is_embedding_model(model_dir)
    return profile_model(config, headers, name or model_dir.name, options, can_lack_head=can_lack_head)


def profile_model(
    config: dict[str, Any],
    headers: Mapping[str, TensorHeader],
    name: str,
    options: LoadOptions = NO_OPTIONS,
    *,
    can_lack_head: bool = False,
) -> ModelProfile:
    """The profile of values that were read before, loaded with `options`.

    can_lack_head: a head that the config does not tie, and of which there are no tensors, is none. Elsewhere
    it is the embedding, whatever the config says: some architectures know no other (hunyuan).
    Raises ModelFilesError where no layers can be told, EXL3 weights do not suit each other, or what is
    quantised is to be quantised again.
    """
    flat, digest = flat_config(config), digest_of(config, dict(headers))
    headers = fold(config, headers, name)
    parts = split_parts(headers, first_int(flat, NUM_LAYERS_KEYS) or None, name)
    check_shapes(parts.layers, flat, first_int(flat, EXPERTS_KEYS), name)
    tensors = LoadedBytes(headers, config, name, options)
    ties = flat.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    is_tied = ties is True or (not parts.head and not (can_lack_head and ties is False))
    embed = [header for header in parts.embed if tensors.params_of(header)]
    head = embed[:1] if is_tied else [header for header in parts.head if tensors.params_of(header)]
    keyed = (header for layer in parts.layers for header in layer.values() if _sets_dtype(header))
    dtype_bytes = tensors.cast_bytes or _dtype_bytes([*parts.embed, *keyed])
    hidden_size = first_int(flat, HIDDEN_KEYS) or _size_of_norm(parts.layers)
    layers = tuple(
        _profile_layer(flat, index, layer, tensors, dtype_bytes, hidden_size=hidden_size)
        for index, layer in enumerate(parts.layers)
    )
    return ModelProfile(
        name=name,
        digest=digest,
        model_type=str(config.get("model_type", "")),
        max_context=first_int(flat, CONTEXT_KEYS, NO_LIMIT_TOKENS),
        hidden_size=hidden_size,
        vocab_size=first_int(flat, ("vocab_size",)) or max((h.shape[0] for h in parts.embed), default=0),
        num_heads=first_int(flat, HEADS_KEYS, 1),
        head_dim=head_dim(flat),
        dtype_bytes=dtype_bytes,
        layers=layers,
        embed_bytes=tensors.nbytes(parts.embed),
        norm_bytes=tensors.nbytes(header for header in parts.other if PER_LAYER not in header.name),
        head_bytes=0 if is_tied else tensors.nbytes(parts.head),
        is_tied=is_tied,
        table_bytes=tensors.nbytes(header for header in parts.other if PER_LAYER in header.name),
        shared_embed_bytes=tensors.nbytes(_shared_embeddings(flat, parts.embed)),
        head_params=sum(map(tensors.params_of, head)),
        head_format=tensors.format_of(head[0]) if head else "",
        head_form=matrix_form(tensors, head[0]) if len(head) == 1 else None,
        precision=told(headers.values()),
        cut_bytes=carry_bytes(flat, layers, hidden_size, dtype_bytes),
    )


def _shared_embeddings(flat: Mapping[str, Any], embed: Sequence[TensorHeader]) -> list[TensorHeader]:
    """The tables, where every stage makes its layers' extra input of them."""
    is_shared = any(PER_LAYER in header.name for header in embed) or flat.get("model_type") == "talkie"
    return [header for header in embed if is_shared and "embed" in header.name]


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with its text part, if it has one, laid over the top level.

    `model_type` is the text part's.
    """
    nested = (config.get(key) for key in ("text_config", "llm_config"))
    text: dict[str, Any] = next((part for part in nested if isinstance(part, dict)), {})
    flat = {**config, **{key: value for key, value in text.items() if value is not None}}
    ffn = config.get("ffn_config")  # dbrx
    return {**ffn, **flat} if isinstance(ffn, dict) else flat


def _profile_layer(
    flat: Mapping[str, Any],
    index: int,
    layer: Mapping[str, TensorHeader],
    tensors: LoadedBytes,
    dtype_bytes: int,
    *,
    hidden_size: int,
) -> LayerProfile:
    routing = Routing(first_int(flat, EXPERTS_KEYS), _top_k(flat, index), hidden_size)
    num_experts, top_k = routing.num_experts, routing.top_k
    weight_bytes = routed_bytes = active_bytes = active_params = width = 0
    decoded = rotated = 0  # EXL3 weights, and inputs of one of them for one token
    formats: dict[str, list[int]] = {}  # dense bytes, routed bytes, active weights
    kinds: tuple[dict[str, TensorHeader], dict[str, TensorHeader]] = {}, {}  # dense, routed
    for rest, header in layer.items():
        nbytes, params = tensors.bytes_of(header), tensors.params_of(header)
        if not nbytes:
            continue
        is_routed = num_experts > 0 and _is_routed(rest, header, num_experts)
        kinds[is_routed][rest] = header
        share = routing.share if is_routed else 1.0
        weight_bytes += nbytes
        routed_bytes += nbytes if is_routed else 0
        active_bytes += round(nbytes * share)
        active_params += round(params * share)
        found = formats.setdefault(tensors.format_of(header), [0, 0, 0])
        found[is_routed] += nbytes
        found[2] += round(params * share)
        if params:
            rows = header.shape[-2] * (header.shape[0] if len(header.shape) == 3 else 1)
            width += round(rows * share)
        if bits_of(header.dtype):
            decoded += params
            rotated = max(rotated, header.shape[-1] * (top_k if is_routed else 1))
    shapes = {rest: header.shape for rest, header in layer.items()}
    shapes |= unpadded(flat, layer)
    cache = cache_profile(flat, index, shapes, dtype_bytes)
    return LayerProfile(
        weight_bytes=weight_bytes,
        active_bytes=active_bytes,
        active_params=active_params,
        output_width=width,
        scan_bytes=STATE_DTYPE_BYTES * scratch_elements(shapes, cache.state_bytes // STATE_DTYPE_BYTES),
        score_copies=(2 + any("sinks" in rest for rest in layer)) if cache.token_bytes else 0,
        cache=cache,
        cache_source=cache_source(flat, index),
        routed_bytes=routed_bytes,
        routed_share=routing.share,
        decode_bytes=DECODED_BYTES * min(decoded, DECODED_WEIGHTS),
        token_decode_bytes=ROTATED_BYTES * rotated,
        formats=tuple(WeightFormat(name, *amounts) for name, amounts in formats.items()),
        forms=layer_forms(tensors, *kinds, routing),
    )


def _is_routed(rest: str, header: TensorHeader, num_experts: int) -> bool:
    """True for weights of experts that a router chooses: one by one, or stacked along the first axis."""
    if "shared" in rest:
        return False
    is_stacked = len(header.shape) >= 2 and header.shape[0] == num_experts
    is_moe = any(
        word in rest for word in ("switch_mlp", "switch_glu", "expert", "moe.", "ffn.", "feed_forward.")
    )
    return "experts." in rest or (is_stacked and is_moe and (len(header.shape) == 3 or "switch" in rest))


def _top_k(flat: Mapping[str, Any], index: int) -> int:
    for key in TOP_K_KEYS:
        value = flat.get(key)
        if isinstance(value, list) and value:
            value = value[min(index, len(value) - 1)]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 1


def _sets_dtype(header: TensorHeader) -> bool:
    """True for the tensors of a layer whose dtype its activations take: norms, and what makes keys."""
    return any(
        word in header.name for word in ("k_proj.", "qkv", "norm.weight", "layernorm.weight", "in_proj.")
    )


def _dtype_bytes(headers: Iterable[TensorHeader]) -> int:
    """Bytes of an activation: float16 and bfloat16 together, or float32 with either, give float32."""
    found = {header.dtype for header in headers} & {"F16", "BF16", "F32"}
    return (
        4 if "F32" in found or len(found) > 1 else max((DTYPE_BITS[dtype] // 8 for dtype in found), default=2)
    )


def _size_of_norm(layers: Iterable[Mapping[str, TensorHeader]]) -> int:
    sizes = (
        h.shape[0] for layer in layers for name, h in layer.items() if "norm" in name and len(h.shape) == 1
    )
    return next(sizes, 1)
