"""Puts `security.tls` into a cluster file and keeps the rest of its text as the user wrote it. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config_read import ConfigError, document_of


def with_tls(path: Path, text: str, tls: dict[str, str]) -> str | None:
    """The text of `path` with security.tls, or None where that needs a person: another form, odd YAML.

    The result is parsed again: nothing but security.tls may have changed.
    """
    before = _parsed(path, text)
    if not isinstance(before, dict) or "nodes" not in before:
        return None
    security = before.get("security") or {}
    if not isinstance(security, dict) or any((security.get("tls") or {}).values()):
        return None
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    new = _in_yaml(text, before, tls) if is_yaml else _in_json(text, tls)
    expected = {**before, "security": {**security, "tls": tls}}
    return new if new is not None and _parsed(path, new) == expected else None


def _parsed(path: Path, text: str) -> Any:
    try:
        return document_of(path, text)
    except ConfigError:
        return None


def _in_yaml(text: str, before: dict[str, Any], tls: dict[str, str]) -> str | None:
    if "security" in before:
        return None
    added = yaml.safe_dump({"security": {"tls": tls}}, sort_keys=False)
    return f"{text.rstrip()}\n\n{added}"


def _in_json(text: str, tls: dict[str, str]) -> str:
    start = text.index("{")
    for key, begin, end in _members(text, start):
        if key != "security":
            continue
        if text[begin] != "{":  # null
            return text[:begin] + json.dumps({"tls": tls}) + text[end:]
        for inner, inner_begin, inner_end in _members(text, begin):
            if inner == "tls":
                return text[:inner_begin] + json.dumps(tls) + text[inner_end:]
        return _appended(text, begin, end, f'"tls": {json.dumps(tls)}')
    end = text.rindex("}") + 1
    return _appended(text, start, end, f'"security": {{"tls": {json.dumps(tls)}}}')


def _appended(text: str, begin: int, end: int, member: str) -> str:
    """The object text[begin:end] with one more member at its end, on a line of its own if others are."""
    inside = text[begin + 1 : end - 1]
    indent = re.match(r"\s*\n([ \t]+)\S", inside)
    comma = "," if inside.strip() else ""
    gap = f"\n{indent[1]}" if indent else (" " if comma else "")
    rest = inside[len(inside.rstrip()) :]
    return f"{text[: begin + 1]}{inside.rstrip()}{comma}{gap}{member}{rest}{text[end - 1 :]}"


def _members(text: str, start: int) -> Iterator[tuple[str, int, int]]:
    """Key, begin and end of the value, of each member of the valid JSON object that begins at `start`."""
    decoder, at = json.JSONDecoder(), _past_space(text, start + 1)
    while text[at] == '"':
        key, at = decoder.raw_decode(text, at)
        begin = _past_space(text, _past_space(text, at) + 1)  # over the colon
        _value, end = decoder.raw_decode(text, begin)
        yield key, begin, end
        at = _past_space(text, end)
        if text[at] == ",":
            at = _past_space(text, at + 1)


def _past_space(text: str, at: int) -> int:
    while text[at] in " \t\r\n":
        at += 1
    return at
