"""The `load` part of the cluster file: what a node makes of the weights while it loads them. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config_read import Table
from planner.load_options import DTYPES, MODES, LoadOptions, Quantization

LOAD_KEYS = ("quantize", "dtype", "kv_bits", "adapters")
QUANTIZE_KEYS = ("bits", "group_size", "mode")


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What the file says under `load`."""

    quantize: Quantization | None = None
    dtype: str | None = None
    kv_bits: int | None = None
    adapters: tuple[str, ...] = ()

    @property
    def options(self) -> LoadOptions:
        """What happens to the weights."""
        return LoadOptions(self.quantize, self.dtype)


def read_load(table: Table) -> LoadConfig:
    """Raises ConfigError with file, key and value."""
    if "kv_bits" in table:
        raise table.error("kv_bits", "is not supported by this version: use null")
    if table.take_list("adapters"):
        raise table.error("adapters", "is not supported by this version: use an empty list")
    return LoadConfig(
        quantize=_read_quantize(table),
        dtype=table.take_choice("dtype", DTYPES, "") or None,
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
