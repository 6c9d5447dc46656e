"""Strict reading of one JSON or YAML file: every mistake becomes one sentence with file, key and value.

Pure after the file is read; any thread may call it.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import EXIT_USAGE, UserError


class ConfigError(UserError, ValueError):
    """A configuration or command line that cannot be used; the message names file, key and value."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_USAGE)


def read_document(path: Path) -> Any:
    """The content of a `.yaml`, `.yml` or JSON file. Raises ConfigError with the line of a syntax error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give --config the path of a cluster file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return document_of(path, text)


def document_of(path: Path, text: str) -> Any:
    """`text` as the content of `path`, whose suffix says how it is written. Raises ConfigError."""
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    return _parse_yaml(path, text) if is_yaml else _parse_json(path, text)


class Table:
    """One mapping of the file with the keys it may have; each `take_*` checks one value."""

    def __init__(self, file: Path, where: str, value: Any, known: Sequence[str]) -> None:
        self.file = file
        self.where = where
        if value is None and not where:
            raise ConfigError(f"{file} is empty: write a cluster file, such as the README has")
        if not isinstance(value, dict):
            raise ConfigError(
                f"{file}: {where or 'the file'} = {show(value)} must be a mapping of keys to values"
            )
        self.values: dict[str, Any] = value
        for key in value:
            if key not in known:
                raise self._unknown(key, known)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def error(self, key: str, rule: str) -> ConfigError:
        """A ConfigError that says which rule the key's value breaks."""
        if key not in self.values:
            return ConfigError(f"{self.file}: {self._path(key)} is missing: it {rule}")
        return ConfigError(f"{self.file}: {self._path(key)} = {show(self.values[key])} {rule}")

    def take_str(self, key: str) -> str | None:
        """A non-empty string, or None where the key is absent or null."""
        value = self.values.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self.error(key, "must be a non-empty string")
        if isinstance(value, str) and not value.isprintable():
            raise self.error(key, "must be text without line breaks and control characters")
        return value.strip() if isinstance(value, str) else None

    def take_choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of `choices`."""
        value = self.values.get(key)
        if value is None:
            return default
        if value not in choices:
            near = nearest(str(value), choices)
            hint = f", the nearest is {show(near)}" if near else ""
            raise self.error(key, f"must be one of {', '.join(choices)}{hint}")
        return str(value)

    def take_int(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number with low <= value <= high."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"must be a whole number from {low} to {high}")
        return value

    def take_number(
        self, key: str, high: float, *, is_zero_allowed: bool = False, low: float = 0.0
    ) -> float | None:
        """A finite number, above zero unless zero is allowed, at least `low` and at most `high`."""
        value = self.values.get(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (
            not is_number
            or not math.isfinite(value)
            or not 0 <= value <= high
            or (value == 0 and not is_zero_allowed)
        ):
            least = "at least 0" if is_zero_allowed else "above 0"
            raise self.error(key, f"must be a number {least} and at most {high:g}")
        if value < low:
            raise self.error(key, f"must be at least {low:g}")
        return float(value)

    def take_bool(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return default if value is None else value

    def take_list(self, key: str) -> list[Any]:
        """A list; empty where the key is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.error(key, "must be a list")
        return value or []

    def take_table(self, key: str, known: Sequence[str]) -> Table:
        """A mapping with the known keys; empty where the key is absent or null."""
        value = self.values.get(key)
        return Table(self.file, self._path(key), {} if value is None else value, known)

    def take_tables(self, key: str, known: Sequence[str]) -> list[Table]:
        """A list of mappings, each with the known keys."""
        items = self.take_list(key)
        return [Table(self.file, f"{self._path(key)}[{i}]", item, known) for i, item in enumerate(items)]

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def _unknown(self, key: Any, known: Sequence[str]) -> ConfigError:
        place = f"{self.where}: " if self.where else ""
        near = nearest(str(key), known)
        hint = f"the nearest known key is {show(near)}" if near else f"known keys are {', '.join(known)}"
        return ConfigError(
            f"{self.file}: {place}unknown key {show(key)} with the value {show(self.values[key])}, {hint}"
        )


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that looks most like `word`, or None where none does."""
    matches = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return matches[0] if matches else None


def show(value: Any) -> str:
    """A value as the user wrote it, cut to 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parse_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ConfigError(
                    f"{path}: the key {show(key)} is given twice, the second time as {show(value)}"
                )
            table[key] = value
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg[0].lower()}{error.msg[1:]} at line {error.lineno}, "
            f"column {error.colno}"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """YAML without the base-60 integers of YAML 1.1 (10:20 would be 620) and without repeated keys."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {show(key)} is not text", key_node.start_mark
            )
        if key in table:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {show(key)} is given twice", key_node.start_mark
            )
        table[key] = loader.construct_object(value_node, deep=True)
    return table


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} is not valid YAML: {error.problem or error.context}{line}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
