"""What a chip can do: peak memory bandwidth and matrix rate, by brand string and GPU core count. Pure.

Apple's figures are the decimal GB/s and FP16 TFLOPS of its technical specifications (apple.com, Tech Specs);
the TFLOPS of a smaller bin are in proportion to its cores. FP16 and FP32 rates are equal on M1 to M4; the
neural accelerators of M5 are not counted. Plain M1 has 68.25 GB/s (LPDDR4X-4266, 16 bytes wide); 200 GB/s is
M1 Pro. There is no M4 Ultra. Measured figures, where there are any, take the table's place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Device = Literal["metal", "cuda", "cpu"]


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
class _Bin:
    min_cores: int
    max_cores: int
    bandwidth_gb_s: float
    tflops: float  # at max_cores


# "M3 Max" -> its bins, smallest first.
APPLE: dict[str, tuple[_Bin, ...]] = {
    "M1": (_Bin(7, 8, 68.25, 2.6),),
    "M1 Pro": (_Bin(14, 16, 200, 5.3),),
    "M1 Max": (_Bin(24, 32, 400, 10.6),),
    "M1 Ultra": (_Bin(48, 64, 800, 21.2),),
    "M2": (_Bin(8, 10, 100, 3.6),),
    "M2 Pro": (_Bin(16, 19, 200, 6.8),),
    "M2 Max": (_Bin(30, 38, 400, 13.6),),
    "M2 Ultra": (_Bin(60, 76, 800, 27.2),),
    "M3": (_Bin(8, 10, 100, 3.6),),
    "M3 Pro": (_Bin(14, 18, 150, 6.4),),
    "M3 Max": (_Bin(30, 30, 300, 10.7), _Bin(40, 40, 400, 14.3)),
    "M3 Ultra": (_Bin(60, 80, 819, 28.6),),
    "M4": (_Bin(8, 10, 120, 3.8),),
    "M4 Pro": (_Bin(16, 20, 273, 8.0),),
    "M4 Max": (_Bin(32, 32, 410, 13.0), _Bin(40, 40, 546, 16.0)),
    "M5": (_Bin(8, 10, 153, 4.0),),
    "M5 Pro": (_Bin(16, 20, 307, 8.0),),
    "M5 Max": (_Bin(32, 32, 460, 12.8), _Bin(40, 40, 614, 16.0)),
}
# Floors below every chip of their kind that runs MLX, so that an unknown one is never favoured.
METAL_FLOOR = (68.25, 2.6)
CUDA_FLOOR = (200.0, 5.0)
CPU_FLOOR = (20.0, 0.1)

_APPLE_NAME = re.compile(r"\bM(\d+)(?:[ -]?(Pro|Max|Ultra))?\b", re.IGNORECASE)
_CUDA_NAME = re.compile(
    r"nvidia|geforce|quadro|\b(rtx|gtx|tesla)\b|\b[abhlv]\d{2,3}\b|\bgb\d{2,3}\b", re.IGNORECASE
)


def find_chip(brand: str | None, gpu_cores: int | None = None) -> Chip:
    """The figures of the chip named by `brand`, such as "Apple M4 Pro".

    Without a core count the smallest GPU counts. An unknown chip gets the floor of its kind.
    """
    if brand is None:
        return Chip("unknown chip", gpu_cores or 0, *METAL_FLOOR, "metal", is_known=False)
    match = _APPLE_NAME.search(brand)
    if match is None:
        floor, device = (CUDA_FLOOR, "cuda") if _CUDA_NAME.search(brand) else (CPU_FLOOR, "cpu")
        return Chip(brand, gpu_cores or 0, *floor, _device(device), is_known=False)
    name = f"M{match.group(1)}" + (f" {match.group(2).capitalize()}" if match.group(2) else "")
    bins = APPLE.get(name)
    if bins is None:
        return Chip(brand, gpu_cores or 0, *METAL_FLOOR, "metal", is_known=False)
    cores = gpu_cores or bins[0].min_cores
    chosen = next((b for b in bins if cores <= b.max_cores), bins[-1])
    share = min(cores / chosen.max_cores, 1.0)
    return Chip(f"Apple {name}", cores, chosen.bandwidth_gb_s, chosen.tflops * share, "metal")


def metal_ceiling_share(memory_bytes: int) -> float:
    """Guess: the part of a Mac's memory that its GPU may use (max_recommended_working_set_size over memory).

    0.667 up to 32 GB, 0.75 above; macOS 26 gives more on large Macs. Only the device itself knows.
    """
    return 0.667 if memory_bytes <= 35 * 10**9 else 0.75


def _device(name: str) -> Device:
    return "cuda" if name == "cuda" else "cpu"
