"""What a node's status says of its kernels. Any thread."""

from __future__ import annotations

from kernels.self_test import Report
from proto import control_pb2


def fill_kernels(status: control_pb2.NodeStatus, report: Report | None) -> None:
    """Add the self-test's report; a shard without expert layers and EXL3 matrices has none."""
    if report is None:
        return
    told = status.kernels
    told.backend, told.num_layers, told.took_s = report.backend, report.num_layers, report.took_s
    told.reason, told.num_tested = "; ".join([*report.reasons, *report.failures]), report.num_tested
    told.num_calls, told.num_matrices = report.num_calls, report.num_matrices
    for block, verdicts in report.blocks.items():
        for one in verdicts:
            told.verdicts.add(
                block=block,
                first_tokens=one.first,
                last_tokens=one.last,
                is_taken=one.is_taken,
                reason=one.reason,
                error=one.error,
                ours_us=one.ours_us,
                mlx_us=one.mlx_us,
                gb_s=one.gb_s,
                num_launches=one.num_launches,
                is_untested=one.is_untested,
            )
