"""What the user wants of the kernels, by MACRAME_KERNELS. Imports no MLX; any thread."""

from __future__ import annotations

import os

VARIABLE = "MACRAME_KERNELS"
CHOICES = ("on", "off", "emulate")


def wanted() -> str:
    """One of CHOICES. Raises ValueError for anything else."""
    asked = os.environ.get(VARIABLE) or "on"
    if asked not in CHOICES:
        raise ValueError(f"{VARIABLE} is {asked!r}: say on, off or emulate.")
    return asked
