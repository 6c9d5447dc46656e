"""The `load` part of the cluster file: what a node makes of the weights while it loads them. Pure."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config_read import Table
from planner.kv_quant import KV_BITS, KV_GROUP_SIZES, KvQuantization
from planner.load_options import DTYPES, MODES, LoadOptions, Quantization

LOAD_KEYS = (
    "quantize",
    "dtype",
    "cache",
    "cache_dir",
    "cache_gb",
    "kv_bits",
    "kv_group_size",
    "adapters",
)
QUANTIZE_KEYS = ("bits", "group_size", "mode")
MAX_GB = 10**6
ADAPTER_KEYS = ("name", "path")
_NAME = re.compile(r"[\w.:@/ +-]{1,128}")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A LoRA or DoRA adapter in mlx-lm's format, and the model name that selects it."""

    name: str
    path: str  # a folder, absolute or relative to the cluster file's


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What the file says under `load`."""

    quantize: Quantization | None = None
    dtype: str | None = None
    cache: bool | None = None  # None: where it saves time
    cache_dir: str | None = None
    cache_gb: float | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    adapters: tuple[AdapterConfig, ...] = ()

    @property
    def options(self) -> LoadOptions:
        """What happens to the weights."""
        return LoadOptions(self.quantize, self.dtype)

    @property
    def kv(self) -> KvQuantization | None:
        """How caches are quantised; None: they are not."""
        return None if self.kv_bits is None else KvQuantization(self.kv_bits, self.kv_group_size)

    def shared(self) -> dict[str, Any]:
        """What all nodes must agree on, for the digest: nothing of one machine's disks."""
        values = {key: value for key, value in asdict(self).items() if not key.startswith("cache")}
        for adapter in values["adapters"]:
            adapter["path"] = Path(adapter["path"]).name
        return values


def read_load(table: Table, model: str) -> LoadConfig:
    """`model`: the configured one, whose names no adapter may take. Raises ConfigError."""
    kv_bits = table.take_int("kv_bits", 0, 64)
    kv_group_size = table.take_int("kv_group_size", 0, 4096, default=64)
    assert kv_group_size is not None
    for key, value, known in (
        ("kv_bits", kv_bits, KV_BITS),
        ("kv_group_size", kv_group_size, KV_GROUP_SIZES),
    ):
        if value is not None and value not in known:
            raise table.error(key, f"must be one of {', '.join(map(str, known))}")
    cache = table.take_bool("cache", False) if "cache" in table else None
    return LoadConfig(
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantize=_read_quantize(table),
        dtype=table.take_choice("dtype", DTYPES, "") or None,
        cache=cache,
        cache_dir=table.take_str("cache_dir"),
        cache_gb=table.take_number("cache_gb", MAX_GB),
        adapters=_read_adapters(table, model),
    )


def _read_quantize(table: Table) -> Quantization | None:
    if "quantize" not in table:
        return None
    how = table.take_table("quantize", QUANTIZE_KEYS)
    mode = how.take_choice("mode", tuple(MODES), "affine")
    sizes, widths = MODES[mode]
    for key, allowed in (("bits", widths), ("group_size", sizes)):
        value = how.values.get(key)
        if value is not None and (type(value) is not int or value not in allowed):
            names = ", ".join(map(str, sorted(allowed)))
            rule = f"must be one of {names}" if len(allowed) > 1 else f"must be {names}"
            raise how.error(key, f"{rule} in the mode {mode}")
    return Quantization.of(mode, how.values.get("bits"), how.values.get("group_size"))


def _read_adapters(table: Table, model: str) -> tuple[AdapterConfig, ...]:
    adapters: list[AdapterConfig] = []
    for entry in table.take_tables("adapters", ADAPTER_KEYS):
        name, path = entry.take_str("name"), entry.take_str("path")
        if name is None or not _NAME.fullmatch(name):
            raise entry.error("name", "must name the adapter in at most 128 letters, digits and .:@/+-_")
        if name in (model, Path(model).name):
            raise entry.error("name", "is the model's own: choose another")
        if path is None:
            raise entry.error("path", "must be the folder of adapter_config.json and adapters.safetensors")
        if any(other.name == name for other in adapters):
            raise entry.error("name", "is given to two adapters: choose another")
        adapters.append(AdapterConfig(name, path))
    return tuple(adapters)
