"""Why a kernel is not used: an exception as one line, for logs and statuses. Values only."""

from __future__ import annotations


def line(error: Exception) -> str:
    """Its kind and its words; compilers write many lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
