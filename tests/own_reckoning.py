"""Bytes and times of a plan reckoned once more, in plain sums over layers. Nothing here calls the cost model.

The rules are those of docs/cost_model.md and docs/memory.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from planner.cost import Link
from planner.model_profile import ModelProfile
from planner.node_profile import NodeProfile
from planner.plan import Assignment, Plan
from planner.solver import PlanOptions

CHUNK = 512
LOCAL, REMOTE = (0.1, 20.0), (0.5, 10.0)  # ms, Gbit/s
FRAME_BYTES = 256


@dataclass(frozen=True, slots=True)
class Reckoning:
    """Of models whose stages share nothing but a tied embedding, and whose layers share no cache."""

    model: ModelProfile
    nodes: Sequence[NodeProfile]
    links: Sequence[Link]
    options: PlanOptions

    # -- bytes --------------------------------------------------------------------------------------------
    def weight_bytes(self, start: int, stop: int) -> int:
        model = self.model
        total = sum(layer.weight_bytes for layer in model.layers[start:stop])
        if start == 0:
            total += model.embed_bytes
        if stop == model.num_layers:
            total += model.norm_bytes + (model.embed_bytes if model.is_tied and start else model.head_bytes)
        return total

    def kv_bytes(self, start: int, stop: int) -> int:
        """A cache grows by 256 tokens, and a window keeps a chunk besides."""
        total = 0
        for layer in self.model.layers[start:stop]:
            cache = layer.cache
            tokens = 256 * math.ceil(self.options.context / 256)
            if cache.window is not None:
                tokens = min(tokens, cache.window - 1 + CHUNK)
            total += cache.state_bytes + cache.token_bytes * tokens
        return total * self.options.concurrency

    # -- times --------------------------------------------------------------------------------------------
    @property
    def prompt_tokens(self) -> int:
        return max(1, min(2048, self.options.context // 2))

    @property
    def num_chunks(self) -> int:
        """Of the prompt without its last token."""
        return max(1, math.ceil((self.prompt_tokens - 1) / CHUNK))

    @property
    def chunk_tokens(self) -> int:
        return max(1, math.ceil((self.prompt_tokens - 1) / self.num_chunks))

    def decode_ms(self, node: NodeProfile, part: Assignment, rows: int = 1) -> float:
        """One step with a row of each of `rows` users at half the context."""
        model, speeds, context = self.model, node.speeds, self.options.context
        weights_ms = {rate.format: rate.weights_ms for rate in speeds.formats}
        total = speeds.stage_ms
        for layer in model.layers[part.start : part.stop]:
            total += speeds.layer_ms
            share = layer.routed_share if rows == 1 else 1 - (1 - layer.routed_share) ** rows
            for form in layer.weight_formats:
                read_ms = (form.dense_bytes + form.routed_bytes * share) / speeds.read_bytes_ms
                total += max(read_ms, rows * form.active_params / weights_ms.get(form.format, math.inf))
            seen = min(context // 2, layer.cache.window or context)
            cache_bytes = layer.cache.state_bytes + layer.cache.token_bytes * seen
            total += rows * cache_bytes / speeds.read_bytes_ms
        if part.stop == model.num_layers:
            nbytes = model.norm_bytes + (model.embed_bytes if model.is_tied else model.head_bytes)
            multiply_ms = rows * model.head_params / weights_ms.get(model.head_format, math.inf)
            total += max(nbytes / speeds.read_bytes_ms, multiply_ms)
        return total

    def chunk_ms(self, node: NodeProfile, part: Assignment) -> float:
        """One chunk of the prompt that first tokens are predicted for."""
        model, speeds, tokens = self.model, node.speeds, self.chunk_tokens
        flops_ms = {rate.format: rate.flops_ms for rate in speeds.formats}
        total = speeds.stage_ms
        for layer in model.layers[part.start : part.stop]:
            total += speeds.layer_ms
            share = layer.routed_share if tokens == 1 else 1 - (1 - layer.routed_share) ** tokens
            for form in layer.weight_formats:
                read_ms = (form.dense_bytes + form.routed_bytes * share) / speeds.read_bytes_ms
                multiply_ms = 2 * form.active_params * tokens / flops_ms.get(form.format, speeds.flops_ms)
                total += max(read_ms, multiply_ms)
            if layer.score_copies:
                seen = min(self.prompt_tokens // 2, layer.cache.window or self.prompt_tokens)
                total += 4 * model.num_heads * model.head_dim * seen * tokens / speeds.flops_ms
        return total

    def hop_ms(self, a: int, b: int, tokens: int) -> tuple[float, float]:
        """From rank a to rank b, and of that how long the link is busy; 0 tokens: ids only."""
        if a == b:
            return 0.0, 0.0
        host = {node.rank: node.host for node in self.nodes}
        latency_ms, gbit_s = LOCAL if host[a] == host[b] else REMOTE
        for link in self.links:
            if link.ranks == {a, b}:
                latency_ms = latency_ms if link.latency_ms is None else link.latency_ms
                gbit_s = gbit_s if link.bandwidth_gbit_s is None else link.bandwidth_gbit_s
        busy_ms = (tokens * self.model.carry_bytes + FRAME_BYTES) * 8 / (gbit_s * 1e6)
        return latency_ms + busy_ms, busy_ms

    # -- a plan -------------------------------------------------------------------------------------------
    def check(self, plan: Plan) -> None:
        """It is a ring of its nodes that fits, and its predictions are the sums of its layers and hops."""
        model, parts, legal = self.model, plan.assignments, self.options.legal_cuts
        assert [a.start for a in parts] == [0, *(a.stop for a in parts[:-1])]
        assert parts[-1].stop == model.num_layers
        assert legal is None or {a.start for a in parts[1:]} <= legal
        assert (plan.context, plan.concurrency) == (self.options.context, self.options.concurrency)
        used = {a.rank: (a.start, a.stop) for a in parts}
        assert len(used) == len(parts)
        assert list(plan.unused_nodes) == [node.name for node in self.nodes if node.rank not in used]
        for node in self.nodes:
            assert node.use or node.rank not in used
            assert not node.use or node.layers is None or used[node.rank] == node.layers
        for part in parts:
            self._check_part(part)
        self._check_predictions(plan)

    def _check_part(self, part: Assignment) -> None:
        node = self._node(part)
        assert part.node == node.name
        assert part.weight_bytes == self.weight_bytes(part.start, part.stop)
        assert part.kv_bytes == self.kv_bytes(part.start, part.stop)
        limit_bytes = (
            node.ceiling_bytes if node.cap_bytes is None else min(node.ceiling_bytes, node.cap_bytes)
        )
        assert part.budget_bytes == max(0, limit_bytes - node.reserve_bytes)
        assert part.weight_bytes + part.kv_bytes + part.activation_bytes <= part.budget_bytes
        one_ms = self.decode_ms(node, part)
        assert part.decode_ms == pytest.approx(one_ms, rel=1e-9)
        prompt_ms = self.num_chunks * self.chunk_ms(node, part)
        assert part.prefill_ms == pytest.approx(prompt_ms + one_ms, rel=1e-9)

    def _check_predictions(self, plan: Plan) -> None:
        parts, users, rows = plan.assignments, plan.concurrency, self.options.rows
        path_ms = sum(self._steps(plan)) + sum(self._hops(plan, 1)[0])
        assert plan.predicted.decode_tok_s == pytest.approx(1e3 / path_ms, rel=1e-9)
        steps_ms, (hops_ms, busy_ms) = self._steps(plan, rows), self._hops(plan, rows)
        many_ms = max((sum(steps_ms) + sum(hops_ms)) / users, max(*steps_ms, *busy_ms) / min(rows, users))
        assert plan.predicted.throughput_tok_s == pytest.approx(1e3 / many_ms, rel=1e-9)
        chunks_ms = [self.chunk_ms(self._node(part), part) for part in parts]
        hops_ms, busy_ms = self._hops(plan, self.chunk_tokens)
        beats_ms = (self.num_chunks - 1) * max(*chunks_ms, *busy_ms)
        first_ms = sum(chunks_ms) + sum(hops_ms) + beats_ms + self._steps(plan)[-1]
        assert plan.predicted.ttft_s == pytest.approx(first_ms / 1e3, rel=1e-9)
        full_bytes = self.weight_bytes(0, self.model.num_layers)
        largest_bytes = max(part.weight_bytes for part in parts)
        assert plan.memory.full_model_bytes == full_bytes
        assert plan.memory.largest_node_bytes == largest_bytes
        assert plan.memory.saved_bytes == full_bytes - largest_bytes

    def _node(self, part: Assignment) -> NodeProfile:
        return next(node for node in self.nodes if node.rank == part.rank)

    def _steps(self, plan: Plan, rows: int = 1) -> list[float]:
        return [self.decode_ms(self._node(part), part, rows) for part in plan.assignments]

    def _hops(self, plan: Plan, tokens: int) -> tuple[list[float], list[float]]:
        """Round the ring from the head and back to it."""
        pairs = list(itertools.pairwise([0, *(part.rank for part in plan.assignments), 0]))
        carried = [0, *[tokens] * (len(pairs) - 2), 0]
        found = [self.hop_ms(a, b, count) for (a, b), count in zip(pairs, carried, strict=True)]
        return [ms for ms, _ in found], [busy_ms for _, busy_ms in found]
