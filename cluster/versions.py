"""Versions of what decides a token, for profiles, status and refusals."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def macrame_version() -> str:
    """Of this package."""
    return _version("macrame")


def mlx_version() -> str:
    """Of mlx."""
    return _version("mlx")


def mlx_lm_version() -> str:
    """Of mlx-lm."""
    return _version("mlx-lm")
