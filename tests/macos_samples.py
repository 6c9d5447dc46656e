"""Outputs of macOS commands, as the manuals document them.

Made by hand from the documented formats: no Mac was at hand when they were written. Where you have one,
compare with its own output.
"""

from __future__ import annotations

import json
from typing import Any

VM_STAT_TAHOE = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                   300000.
Pages active:                                 900000.
Pages inactive:                               800000.
Pages speculative:                            100000.
Pages throttled:                                   0.
Pages wired down:                             200000.
Pages purgeable:                               20000.
"Translation faults":                    14026101855.
Pages copy-on-write:                       640215567.
Pages zero filled:                       15961381702.
Pages reactivated:                        2447109063.
Pages purged:                               63065002.
File-backed pages:                           1100000.
Anonymous pages:                              700000.
Pages stored in compressor:                  1446840.
Pages occupied by compressor:                 479875.
Decompressions:                            983271589.
Compressions:                             1278414336.
Pageins:                                  6063804108.
Pageouts:                                   10665701.
Swapins:                                    41717681.
Swapouts:                                   69922789.
Pages tagged:                                 170006.
Pages tagged resident:                        125642.
"""
VM_STAT_SEQUOIA = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               18660.
Pages active:                            310000.
Pages inactive:                          300000.
Pages speculative:                          566.
Pages throttled:                              0.
Pages wired down:                        275610.
Pages purgeable:                          10000.
"Translation faults":                1694435670.
Pages copy-on-write:                   57165632.
Pages zero filled:                   1043040697.
Pages reactivated:                    103361766.
Pages purged:                          39991898.
File-backed pages:                       150566.
Anonymous pages:                         460000.
Pages stored in compressor:              600000.
Pages occupied by compressor:            100000.
Decompressions:                        78999421.
Compressions:                          95061680.
Pageins:                               20957857.
Pageouts:                               1932868.
Swapins:                                  23073.
Swapouts:                                 43424.
"""
VM_STAT_INTEL = VM_STAT_SEQUOIA.replace("16384", "4096")
VM_STAT_SNOW_LEOPARD = """\
Mach Virtual Memory Statistics: (page size of 4096 bytes)
Pages free:                          90000.
Pages active:                       205000.
Pages inactive:                      32000.
Pages speculative:                  134000.
Pages wired down:                    61009.
"Translation faults":             26323651.
Pages copy-on-write:                177180.
Pages zero filled:                15230394.
Pages reactivated:                       3.
Pageins:                            388108.
Pageouts:                                0.
Object cache: 14 hits of 797355 lookups (0% hit rate)
"""

SYSCTL = {  # `sysctl -n machdep.cpu.brand_string` and `sysctl -n hw.memsize`
    "mini": ("Apple M4\n", "17179869184\n"),
    "max": ("Apple M3 Max\n", "137438953472\n"),
    "intel": ("Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz\n", "34359738368\n"),
    "virtual": ("Apple M1 (Virtual)\n", "8589934592\n"),
}


def _displays(*displays: dict[str, Any]) -> str:
    return json.dumps({"SPDisplaysDataType": list(displays)})


_SCREEN = {"_name": "Color LCD", "_spdisplays_pixels": "3456 x 2234", "spdisplays_main": "spdisplays_yes"}
DISPLAYS = {  # `system_profiler SPDisplaysDataType -json`
    "mini": _displays(
        {
            "_name": "Apple M4",
            "spdisplays_mtlgpufamilysupport": "spdisplays_metal4",
            "spdisplays_vendor": "sppci_vendor_Apple",
            "sppci_bus": "spdisplays_builtin",
            "sppci_cores": "10",
            "sppci_device_type": "spdisplays_gpu",
            "sppci_model": "Apple M4",
        }
    ),
    "max": _displays(
        {
            "_name": "kHW_AppleM3MaxItem",
            "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
            "spdisplays_ndrvs": [_SCREEN, {"_name": "Studio Display"}],
            "spdisplays_vendor": "sppci_vendor_Apple",
            "sppci_bus": "spdisplays_builtin",
            "sppci_cores": "40",
            "sppci_device_type": "spdisplays_gpu",
            "sppci_model": "Apple M3 Max",
        }
    ),
    "intel": _displays(
        {
            "_name": "kHW_IntelUHDGraphics630Item",
            "spdisplays_vram_dyn": "1536 MB",
            "spdisplays_vendor": "Intel",
            "sppci_bus": "spdisplays_builtin",
            "sppci_model": "Intel UHD Graphics 630",
        },
        {
            "_name": "kHW_AMDRadeonPro5500MItem",
            "spdisplays_ndrvs": [_SCREEN],
            "spdisplays_vendor": "sppci_vendor_amd",
            "spdisplays_vram": "8 GB",
            "sppci_bus": "spdisplays_pcie_device",
            "sppci_model": "AMD Radeon Pro 5500M",
        },
    ),
    "virtual": _displays(
        {
            "_name": "Display",
            "spdisplays_ndrvs": [{"_name": "Apple Virtual", "_spdisplays_resolution": "1920 x 1080"}],
            "spdisplays_vendor": "Apple (0x106b)",
            "sppci_model": "Apple Paravirtual device",
        }
    ),
}
