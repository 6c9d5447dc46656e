"""What one layer weighs and reads, by the format of its weights. Pure values."""

from __future__ import annotations

from dataclasses import dataclass

from planner.forms import Form
from planner.kv_profile import CacheProfile


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The weights of one layer, or of the head, that are stored in one format (see planner.speeds)."""

    format: str
    dense_bytes: int  # read by every pass; scales, biases and norms too
    routed_bytes: int  # experts that a router chooses of
    active_params: int  # multiplied with one token


@dataclass(frozen=True, slots=True)
class FormUse:
    """Blocks or matrices of one form in a layer: how many, and what of the layer's weights they are."""

    form: Form
    count: int
    weights: tuple[WeightFormat, ...]


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """One layer."""

    weight_bytes: int
    active_bytes: int  # read for one token: of routed experts only the chosen ones
    active_params: int  # multiplied with one token
    output_width: int  # elements that all its linears give for one token
    score_copies: int  # of the attention scores that one step holds where they are written to memory
    scan_bytes: int  # scratch of a recurrent layer's prefill
    cache: CacheProfile
    cache_source: int | None = None  # the earlier layer whose cache it reads; None: no other's
    routed_bytes: int = 0  # of weight_bytes, experts that a router chooses
    routed_share: float = 1.0  # of them that one token chooses
    decode_bytes: int = 0  # scratch of decoding EXL3 weights, whatever the number of tokens
    token_decode_bytes: int = 0  # and for each token

    formats: tuple[WeightFormat, ...] = ()  # empty: of no known format
    forms: tuple[FormUse, ...] = ()  # what a node may have measured as a whole

    @property
    def weight_formats(self) -> tuple[WeightFormat, ...]:
        """The layer's weights by format."""
        if self.formats:
            return self.formats
        dense_bytes = self.active_bytes - round(self.routed_bytes * self.routed_share)
        return (WeightFormat("", dense_bytes, self.routed_bytes, self.active_params),)

    def batch_share(self, num_tokens: int) -> float:
        """The part of the routed experts that a pass over so many tokens reads, each expert once.

        Tokens choose independently: of E experts, k a token, E (1 - (1 - k / E)^n) are expected to be
        chosen.
        """
        return 1 - (1 - self.routed_share) ** num_tokens if num_tokens > 1 else self.routed_share
