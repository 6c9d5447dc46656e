"""Every case of the ladder."""

from __future__ import annotations

from kernels.ladder.case import Case
from kernels.ladder.exl3_cases import exl3_cases
from kernels.ladder.moe_cases import moe_cases
from kernels.ladder.row_cases import row_sum_cases


def all_cases() -> list[Case]:
    return [*row_sum_cases(), *moe_cases(), *exl3_cases()]
