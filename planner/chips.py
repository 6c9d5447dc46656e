"""What a chip can do: peak memory bandwidth and matrix rate, by brand string and GPU core count. Pure.

The figures and where each is from stand in planner/chips.json. The TFLOPS of a smaller bin are in proportion
to its cores. FP16 and FP32 rates are equal on M1 to M4; the neural accelerators of M5 are not counted. Plain
M1 has 68.25 GB/s; 200 GB/s is M1 Pro. There is no M4 Ultra. Measured figures, where there are any, take the
table's place.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Device = Literal["metal", "cuda", "cpu"]
TABLE = Path(__file__).with_name("chips.json")


@dataclass(frozen=True, slots=True)
class Chip:
    """Peak figures. `is_known` is False for a floor that stands in for a chip that the table lacks."""

    name: str
    gpu_cores: int  # 0: unknown, or not a GPU
    bandwidth_gb_s: float
    tflops: float
    device: Device
    is_known: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the table. Raises ValueError for a figure that is not above 0, or cores out of order."""

    name: str
    bandwidth_gb_s: float
    tflops: float  # dense FP16 or BF16, at max_cores
    max_memory_gb: float  # the most that is sold with it
    source: str
    min_cores: int = 0  # 0: the chip has no bins
    max_cores: int = 0
    brands: tuple[str, ...] = ()  # what CUDA and people call it, as `_plain` writes it

    def __post_init__(self) -> None:
        for key in ("bandwidth_gb_s", "tflops", "max_memory_gb"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"{self.name}: {key} = {getattr(self, key)} must be above 0")
        if not 0 <= self.min_cores <= self.max_cores:
            raise ValueError(f"{self.name}: min_cores = {self.min_cores} must be at most {self.max_cores}")


@dataclass(frozen=True, slots=True)
class Floor:
    """Below every chip of its kind, so that an unknown one is never favoured."""

    bandwidth_gb_s: float
    tflops: float
    source: str


def _plain(brand: str) -> str:
    """ "NVIDIA GeForce RTX 4090" as "rtx 4090", "NVIDIA A100-SXM4-80GB" as "a100 sxm4 80gb"."""
    words = re.sub(r"\((?:r|tm)\)|[-_]", " ", brand.lower()).split()
    return " ".join(word for word in words if word not in {"nvidia", "geforce", "gpu", "tensor", "core"})


def _entry(values: dict[str, Any]) -> Entry:
    return Entry(**values | {"brands": tuple(map(_plain, values.get("brands", ())))})


_CONTENT = json.loads(TABLE.read_text(encoding="utf-8"))
NVIDIA: tuple[Entry, ...] = tuple(map(_entry, _CONTENT["nvidia"]))
FLOORS: dict[Device, Floor] = {device: Floor(**values) for device, values in _CONTENT["floors"].items()}
APPLE: dict[str, tuple[Entry, ...]] = {}  # "M3 Max" -> its bins, smallest first
for _bin in map(_entry, _CONTENT["apple"]):
    APPLE[_bin.name] = (*APPLE.get(_bin.name, ()), _bin)

_APPLE_NAME = re.compile(r"\bM(\d+)(?:[ -]?(Pro|Max|Ultra))?\b", re.IGNORECASE)
_VIRTUAL = re.compile(
    r"\bvirtual\b|paravirtual", re.IGNORECASE
)  # as "Apple M1 (Virtual)": not the chip's GPU
_OTHER_CPU = re.compile(r"\bintel\b|\bamd\b", re.IGNORECASE)  # Intel sold a Core M5
_CUDA_NAME = re.compile(
    r"nvidia|geforce|quadro|\b(rtx|gtx|tesla)\b|\b[abhlv]\d{2,3}s?\b|\bgb\d{2,3}\b", re.IGNORECASE
)


def find_chip(brand: str | None, gpu_cores: int | None = None) -> Chip:
    """The figures of the chip named by `brand`, such as "Apple M4 Pro" or "NVIDIA GeForce RTX 4090".

    Without a core count the smallest GPU counts. An unknown chip gets the floor of its kind.
    """
    if brand is None:
        return _floor("unknown chip", gpu_cores, "metal")
    plain = _plain(brand)
    for entry in NVIDIA:
        if plain in entry.brands:
            return Chip(f"NVIDIA {entry.name}", gpu_cores or 0, entry.bandwidth_gb_s, entry.tflops, "cuda")
    match = None if _OTHER_CPU.search(brand) else _APPLE_NAME.search(brand)
    if _CUDA_NAME.search(brand) and not brand.lower().startswith("apple"):
        return _floor(brand, gpu_cores, "cuda")
    if match is None:
        return _floor(brand, gpu_cores, "metal" if brand.lower().startswith("apple") else "cpu")
    name = f"M{match.group(1)}" + (f" {match.group(2).capitalize()}" if match.group(2) else "")
    bins = APPLE.get(name)
    if bins is None or _VIRTUAL.search(brand):
        return _floor(brand, gpu_cores, "metal")
    cores = gpu_cores or bins[0].min_cores
    chosen = next((b for b in bins if cores <= b.max_cores), bins[-1])
    share = min(cores / chosen.max_cores, 1.0)
    return Chip(f"Apple {name}", cores, chosen.bandwidth_gb_s, chosen.tflops * share, "metal")


def metal_ceiling_share(memory_bytes: int) -> float:
    """Guess: the part of a Mac's memory that its GPU may use (max_recommended_working_set_size over memory).

    0.667 up to 32 GB, 0.75 above; macOS 26 gives more on large Macs. Only the device itself knows.
    """
    return 0.667 if memory_bytes <= 35 * 10**9 else 0.75


def _floor(brand: str, gpu_cores: int | None, device: Device) -> Chip:
    floor = FLOORS[device]
    return Chip(brand, gpu_cores or 0, floor.bandwidth_gb_s, floor.tflops, device, is_known=False)
