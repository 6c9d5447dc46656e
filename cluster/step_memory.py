"""What a stage's steps take of MLX's memory, as MLX counts it. Compute thread; any thread may read."""

from __future__ import annotations

import mlx.core as mx


class StepMemory:
    """Begins where the shard is loaded and no session is open.

    MLX's peak counter starts anew with each measurement, so `peak_bytes` is kept here, since the load began.
    """

    def __init__(self) -> None:
        self._base_bytes = mx.get_active_memory()  # weights, and the constants that modules made
        self.peak_bytes = mx.get_peak_memory()
        self.kv_bytes = 0  # what all sessions' caches hold
        self.peak_kv_bytes = 0
        self.activation_bytes = 0  # the most that a step took beside weights and KV
        self.beside_bytes = 0  # what a draft model's caches hold
        mx.reset_peak_memory()

    def rebase(self) -> None:
        """Something else was loaded, or let go: what is in memory now is what steps begin with."""
        self._base_bytes = mx.get_active_memory()
        self.peak_bytes = max(self.peak_bytes, mx.get_peak_memory())
        mx.reset_peak_memory()

    def measure(self, kv_bytes: int) -> None:
        """After one or more steps, when the caches hold `kv_bytes`."""
        peak_bytes = mx.get_peak_memory()
        mx.reset_peak_memory()
        before, self.kv_bytes = self.kv_bytes, kv_bytes
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self.peak_kv_bytes = max(self.peak_kv_bytes, kv_bytes)
        scratch_bytes = peak_bytes - self._base_bytes - max(before, kv_bytes) - self.beside_bytes
        self.activation_bytes = max(self.activation_bytes, scratch_bytes)
