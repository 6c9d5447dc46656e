"""Proofs of cuts that were made before: shipped with the release, and in the user's cache folder.

A proof holds for one mlx-lm version, one architecture and one layer pattern: the model's config shrunk as the
proof shrinks it (shard_loader/shrink.py), so that checkpoints which differ in sizes, vocabulary or
quantisation share it. Touches no MLX; any thread or process may call it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shard_loader.cache_home import user_cache_dir
from shard_loader.cut_proof import CutProof, RowProof
from shard_loader.shrink import TINY, recipes
from shard_loader.whole_file import write_whole

SHIPPED = Path(__file__).parent / "cut_proofs.json"
ALL = "all"
# What a config says that no layer is built from.
_IRRELEVANT = (
    *("transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path"),
    *("initializer_range", "attention_dropout", "hidden_dropout", "auto_map", "model_name", "is_decoder"),
)
_IRRELEVANT_STARTS = ("vision_", "audio_", "quantiz", "compression")
_IRRELEVANT_ENDS = ("_token_id", "_token_index", "_token_ids", "_dropout")
_ROW_NAMES = tuple(field.name for field in fields(RowProof))
_SOURCES = (
    *("batch_proof", "batch_state", "carry", "crossing", "cuts", "growing", "kv_rows", "layout", "merging"),
    *(
        "ownership",
        "reach",
        "read_proof",
        "rehearsal",
        "rewind_proof",
        "rewinding",
        "shard",
        "sharing",
        "shrink",
        "state",
        "trial",
    ),
)


def pattern_of(config: dict[str, Any]) -> str:
    """16 hex digits that configs of the same architecture and layer pattern share, whatever their sizes."""
    _, small = next(iter(recipes(config)))
    return _digest(json.dumps(_relevant(small), sort_keys=True, default=str).encode())


def _pattern(config: dict[str, Any], is_tiny: bool) -> str:
    """Where the tiniest model did not run, the sizes count too."""
    if is_tiny:
        return pattern_of(config)
    return _digest(json.dumps(_relevant(config), sort_keys=True, default=str).encode())


def find(config: dict[str, Any], cuts: Sequence[int] | None) -> list[CutProof] | None:
    """The proof of these cuts together, or of every cut (None); None where there is no such proof.

    A proof of every cut also answers for some cuts where it refuses one of them.
    """
    every = _read_user(config, None) or _read_shipped(config)
    if cuts is None or not cuts:
        return every if cuts is None else []
    if every is not None:
        asked = [proof for proof in every if proof.cut in cuts]
        if len(asked) == len(set(cuts)) and not all(proof.exact for proof in asked):
            return asked
    return _read_user(config, cuts)


def save(config: dict[str, Any], cuts: Sequence[int] | None, recipe: str, proofs: Sequence[CutProof]) -> None:
    """Keep a proof for later; a cache folder that cannot be written is no error.

    recipe: how the model was shrunk. Only a proof on the tiniest model holds for other sizes too.
    """
    _write(
        _user_path(config, cuts, recipe == TINY),
        {"model_type": config.get("model_type"), "cuts": [asdict(p) for p in proofs]},
    )


def find_rows(config: dict[str, Any]) -> RowProof | None:
    """What may be done with this architecture's sequences; None: it was not tried."""
    shipped = _shipped_entry(config)
    if shipped is not None and all(name in shipped for name in _ROW_NAMES):
        return RowProof(*(bool(shipped[name]) for name in _ROW_NAMES))
    for is_tiny in (True, False):
        try:
            found = json.loads(_path(config, "rows", is_tiny).read_text())
            verdicts = [found[name] for name in _ROW_NAMES]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all(type(verdict) is bool for verdict in verdicts):
            return RowProof(*verdicts)
    return None


def save_rows(config: dict[str, Any], recipe: str, proof: RowProof) -> None:
    """Keep that, as `save` keeps proofs of cuts."""
    content = {"model_type": config.get("model_type"), **asdict(proof)}
    _write(_path(config, "rows", recipe == TINY), content)


def mlx_lm_version() -> str:
    """Of the installed package, without importing it."""
    try:
        return version("mlx-lm")
    except PackageNotFoundError:
        return "none"


def as_shipped(configs: Iterable[tuple[dict[str, Any], Sequence[CutProof], RowProof]]) -> dict[str, Any]:
    """The content of the shipped file for these proofs of every cut, and of what may be done with rows."""
    patterns: dict[str, Any] = {}
    for config, proofs, rows in configs:
        refused = {str(proof.cut): proof.reason for proof in proofs if not proof.exact}
        patterns[_shipped_key(config)] = {
            "num_layers": len(proofs) + 1,
            "refused": refused,
            **asdict(rows),
        }
    return {"mlx_lm": mlx_lm_version(), "patterns": dict(sorted(patterns.items()))}


def _relevant(value: Any) -> Any:
    if isinstance(value, list):
        return [_relevant(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _relevant(item)
        for key, item in value.items()
        if key not in _IRRELEVANT
        and not key.startswith(_IRRELEVANT_STARTS)
        and not key.endswith(_IRRELEVANT_ENDS)
    }


def _shipped_key(config: dict[str, Any]) -> str:
    return f"{config.get('model_type')}/{pattern_of(config)}"


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content).encode(), 0o600)
    except OSError:
        return


def _shipped_entry(config: dict[str, Any]) -> dict[str, Any] | None:
    shipped = _shipped()
    if shipped.get("mlx_lm") != mlx_lm_version():
        return None
    found: dict[str, Any] | None = shipped["patterns"].get(_shipped_key(config))
    return found


def _read_shipped(config: dict[str, Any]) -> list[CutProof] | None:
    found = _shipped_entry(config)
    if found is None:
        return None
    refused = {int(cut): reason for cut, reason in found["refused"].items()}
    return [
        CutProof(cut, cut not in refused, None if cut in refused else 0.0, refused.get(cut, ""))
        for cut in range(1, found["num_layers"])
    ]


@cache
def _shipped() -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(SHIPPED.read_text())
    except (OSError, ValueError):
        return {}
    return content


def _read_user(config: dict[str, Any], cuts: Sequence[int] | None) -> list[CutProof] | None:
    for is_tiny in (True, False):
        try:
            content = json.loads(_user_path(config, cuts, is_tiny).read_text())
            proofs = [CutProof(**proof) for proof in content["cuts"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if all(type(p.cut) is int and type(p.exact) is bool for p in proofs):
            return proofs
    return None


def _user_path(config: dict[str, Any], cuts: Sequence[int] | None, is_tiny: bool) -> Path:
    wanted = ALL if cuts is None else "-".join(map(str, sorted(set(cuts))))
    return _path(config, wanted, is_tiny)


def _path(config: dict[str, Any], wanted: str, is_tiny: bool) -> Path:
    """Named after all that a proof rests on, the code that cuts included."""
    key = json.dumps([config.get("model_type"), _pattern(config, is_tiny), wanted, _versions()])
    kind = "".join(c for c in str(config.get("model_type")) if c.isalnum() or c in "-_")[:40]
    return user_cache_dir() / "cuts" / f"{kind}-{_digest(key.encode())}.json"


@cache
def _versions() -> list[str]:
    folder = Path(__file__).parent
    sources = b"".join((folder / f"{name}.py").read_bytes() for name in _SOURCES)
    packages = []
    for name in ("mlx-lm", "mlx"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(name)
    return [*packages, _digest(sources)]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
