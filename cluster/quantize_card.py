"""README.md of a quantised folder: of what it was made and how, then the card of the source.

The source's card describes other weights: of its metadata only what stays true is kept, and its text stands
below a sentence that says whose it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from cluster.quantize_source import Source
from cluster.versions import macrame_version

NAME = "README.md"
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model", "datasets")
_OF_WEIGHTS = re.compile(r"\d-?bit|quant|mlx|exl\d|gguf|gptq|awq|fp8|\bint\d", re.IGNORECASE)
_METADATA = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


def is_card(file: Path) -> bool:
    return file.name.lower() == NAME.lower()


def card(source: Source, becomes: str, options: str, tags: list[str]) -> str:
    """The new file's text.

    becomes: how the weights are stored now. options: of the command besides --model. tags: of the new form.
    """
    name = source.folder.name
    told, text = _read(source.folder)
    metadata = {key: told[key] for key in _KEPT if key in told}
    if "base_model" in metadata:
        metadata["base_model_relation"] = "quantized"
    old = told.get("tags")
    kept = [tag for tag in old if not _OF_WEIGHTS.search(str(tag))] if isinstance(old, list) else []
    metadata["tags"] = [*kept, *tags]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}, {becomes}",
        "",
        f"Made of {name} ({source.stored}) with macrame {macrame_version()}:",
        "",
        f"    macrame quantize {options} --model {name}",
    ]
    if text.strip():
        lines += [
            "",
            f"What follows is the card of {name}: what it says of bits, sizes and formats is of that one.",
            "",
            "---",
            "",
            text.strip(),
        ]
    return "\n".join(lines) + "\n"


def _read(source: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of the source's card; empty where there is none."""
    file = next(filter(is_card, sorted(source.iterdir())), None)
    if file is None or not file.is_file():
        return {}, ""
    text = file.read_text(encoding="utf-8", errors="replace")
    found = _METADATA.match(text)
    if found is None:
        return {}, text
    try:
        metadata = yaml.load(found[1], yaml.BaseLoader)  # strings alone: a language may be no
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, text[found.end() :]
