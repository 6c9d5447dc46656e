"""Which of this machine's devices a node computes on, where the cluster file says it."""

from __future__ import annotations

import mlx.core as mx

from cluster.errors import EXIT_USAGE, UserError


def choose_device(name: str, place: str) -> None:
    """cpu or gpu, for all threads; before MLX has done anything. Raises UserError where there is none."""
    if name == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        raise UserError(
            f'{place}.device = "gpu", but MLX finds no GPU on this machine: install macrame with the extra '
            'cuda13 where there is an NVIDIA one, or write "cpu"',
            EXIT_USAGE,
        )
    mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
