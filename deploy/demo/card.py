"""The README of the demo model's folder, from measured facts; pure text."""

from __future__ import annotations

from typing import Any


def render(facts: dict[str, Any]) -> str:
    return f"# {facts}\n"
