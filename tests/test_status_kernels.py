"""What `macrame status` says of kernels."""

from __future__ import annotations

from typing import Any

from cluster.api.status import to_plain
from cluster.kernel_status import fill_kernels
from deploy.status_kernels import render_kernels
from kernels.self_test import Report
from kernels.verdicts import NOT_YET, Verdict
from proto import control_pb2

BLOCK = "8 of 128 experts, 2048 x 768, gate affine4/64 (bfloat16), up affine4/64 (bfloat16), down ..."


def lines_of(report: Report | None) -> list[str]:
    """As they come from a node's report, over its status, as JSON."""
    status = control_pb2.NodeStatus()
    fill_kernels(status, report)
    node: dict[str, Any] = {"rank": 1, "name": "mini", "node": to_plain(status)}
    return render_kernels([node])


def report_of(*verdicts: Verdict, backend: str = "metal", reasons: tuple[str, ...] = ()) -> Report:
    return Report(backend, 5, {BLOCK: verdicts} if verdicts else {}, list(reasons))


def test_a_node_without_expert_layers_says_nothing() -> None:
    assert lines_of(None) == []
    assert render_kernels([{"rank": 0, "name": "old", "node": {}}]) == []  # of an earlier release


def test_what_is_used_and_what_it_gains() -> None:
    report = report_of(
        Verdict(1, 1, True, ours_us=10, mlx_us=19),
        Verdict(2, 4, True, ours_us=10, mlx_us=14),
        Verdict(5, 8, False, "0.90 times as fast as MLX's operations", ours_us=10, mlx_us=9),
        Verdict(9, 16, True, ours_us=10, mlx_us=13),
        Verdict(17, 32, False, "wrong by 1.0e-01 of the largest value; 8e-03 is allowed", error=0.1),
        Verdict(33, 63, False, "RuntimeError: no such function", is_final=False),
        Verdict(64, 0, True, ours_us=10, mlx_us=11),
    )
    assert lines_of(report) == [
        "rank 1 (mini): kernels (metal) for 1 to 4, 9 to 16, 64 and more tokens, 1.1 to 1.9 times as fast as "
        "MLX's; 17 to 32: wrong by 1.0e-01 of the largest value; 8e-03 is allowed; 33 to 63: RuntimeError: "
        "no such function (8 of 128 experts, 2048 x 768)"
    ]


def test_what_is_not_tested_yet() -> None:
    rest = [Verdict(2, 4, False, NOT_YET, is_final=False), Verdict(5, 8, False, NOT_YET, is_final=False)]
    assert lines_of(report_of(Verdict(1, 1, True, ours_us=10, mlx_us=19), *rest)) == [
        "rank 1 (mini): kernels (metal) for 1 tokens, 1.9 times as fast as MLX's; 2 to 8: not tested yet: "
        "the node does so while nobody asks for anything (8 of 128 experts, 2048 x 768)"
    ]
    assert lines_of(report_of(*rest)) == [
        "rank 1 (mini): MLX's operations for experts: not tested yet: the node does so while nobody asks for "
        "anything (8 of 128 experts, 2048 x 768)"
    ]


def test_what_was_not_timed() -> None:
    report = report_of(Verdict(1, 1, True), Verdict(2, 4, True), Verdict(5, 0, True), backend="emulated")
    assert lines_of(report) == [
        "rank 1 (mini): kernels (emulated) for 1 and more tokens, not timed (8 of 128 experts, 2048 x 768)"
    ]


def test_why_none_is_used() -> None:
    wrong = Verdict(1, 1, False, "wrong by 2.5e-01 of the largest value; 8e-03 is allowed")
    assert lines_of(report_of(wrong)) == [
        "rank 1 (mini): MLX's operations for experts: wrong by 2.5e-01 of the largest value; 8e-03 is "
        "allowed (8 of 128 experts, 2048 x 768)"
    ]
    assert lines_of(report_of(backend="", reasons=("MLX uses no GPU here",))) == [
        "rank 1 (mini): MLX's operations for experts: MLX uses no GPU here"
    ]


def test_exl3_matrices_have_a_line_for_each_form() -> None:
    blocks = {
        "exl3 4096 -> 4096, 3 bits mcg, float16": (
            Verdict(1, 1, True, ours_us=10, mlx_us=310),
            Verdict(2, 8, True, ours_us=10, mlx_us=200),
        ),
        "exl3 4096 -> 1024, 3 bits mcg, float16": (
            Verdict(1, 0, False, "wrong by 2.5e-01 of the largest value; 1e-03 is allowed", error=0.25),
        ),
    }
    assert lines_of(Report("metal", 0, blocks, num_matrices=9)) == [
        "rank 1 (mini): kernels (metal) for 1 to 8 tokens, 20.0 to 31.0 times as fast as MLX's "
        "(exl3 4096 -> 4096, 3 bits mcg, float16)",
        "rank 1 (mini): MLX's operations for EXL3: wrong by 2.5e-01 of the largest value; 1e-03 is allowed "
        "(exl3 4096 -> 1024, 3 bits mcg, float16)",
    ]
    assert lines_of(Report("", 0, reasons=["MLX uses no GPU here"], num_matrices=9)) == [
        "rank 1 (mini): MLX's operations for EXL3: MLX uses no GPU here"
    ]
