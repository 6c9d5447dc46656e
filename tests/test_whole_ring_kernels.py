"""Experts and EXL3 matrices through a real ring whose nodes use the kernels, run by the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.emulator import build
from proto import control_pb2
from tests.reference import greedy
from tests.ring_processes import RingProcesses
from tests.test_whole_ring_exact import CUTS, NUM_LAYERS, PROMPTS, ranges
from tests.tiny_exl3 import write_exl3
from tests.tiny_models import write_checkpoint
from tests.zoo.checkpoint import write_zoo_checkpoint

NUM_TOKENS = 16
TOLERANCE = 1e-3  # of a token's log-probability

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler (g++ or clang++) is here"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32 scales: what both sides round is so little that greedy tokens are the same."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    quantize = {"bits": 4, "group_size": 32}
    return write_checkpoint("qwen3_moe", folder, num_layers=NUM_LAYERS, quantize=quantize)


@pytest.fixture(scope="module")
def exl3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Experts and all other linears in 3 bits, and the same model with the weights that they stand for."""
    return write_exl3("qwen3_moe", tmp_path_factory.mktemp("exl3"), num_layers=NUM_LAYERS)


def check(ring: RingProcesses, model: Path, prompts: Sequence[list[int]] = PROMPTS) -> None:
    """Each prompt alone, then all at once in shared steps."""
    for prompt in prompts:
        got = [t for reply in ring.generate(prompt, NUM_TOKENS, logprobs=True) for t in reply.tokens]
        tokens, logprobs = greedy(model, prompt, NUM_TOKENS)
        assert [token.id for token in got] == tokens
        assert [token.logprob for token in got] == pytest.approx(logprobs, abs=TOLERANCE)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: ring.tokens(prompt, NUM_TOKENS), prompts))
    assert answers == [greedy(model, prompt, NUM_TOKENS)[0] for prompt in prompts]


def test_three_stages_with_kernels_are_the_reference(model: Path, tmp_path: Path) -> None:
    """With a cache folder of their own: kernels are compiled, tested while heartbeats go on, and kept."""
    env = {"MACRAME_KERNELS": "emulate", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[3]), env=env) as ring:
        ring.wait_status(lambda told: any(r.node.activity == "testing kernels" for r in told.ranks), 300)
        ring.wait_ok(300)
        check(ring, model)
        for rank, (start, stop) in enumerate(ranges(NUM_LAYERS, CUTS[3])):
            told = ring.node_status(rank).kernels
            assert (told.backend, told.num_layers, told.reason) == ("emulated", stop - start, "")
            assert [verdict.is_taken for verdict in told.verdicts] == [True] * 6 + [False]  # not from 64 on
            assert all(verdict.error < 1e-4 for verdict in told.verdicts)
            assert told.num_calls > 4 * NUM_TOKENS * (stop - start)
        before = ring.node_status(2).incarnation
        ring.kill(2)
        ring.start(2)
        ring.wait_status(lambda new: new.status == "ok" and new.ranks[2].node.incarnation != before, 300)
        assert ring.tokens(PROMPTS[0], NUM_TOKENS) == greedy(model, PROMPTS[0], NUM_TOKENS)[0]
        again = ring.node_status(2).kernels
        assert again.num_tested == 0  # read from the file, which has the last word of three nodes
        assert [one.is_taken for one in again.verdicts] == [True] * 6 + [False]
        assert again.num_calls > 0


def test_what_no_start_had_time_for_is_tested_while_the_ring_rests(model: Path, tmp_path: Path) -> None:
    """The ring is ready at once and serves with MLX's operations; then it uses the kernels."""
    env = {"MACRAME_KERNELS": "emulate", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    late = dict.fromkeys(range(3), "kernel_budget_s=0")
    with RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[3]), env=env, faults=late) as ring:
        ring.wait_ok(300)
        first = ring.node_status(1).kernels
        assert [one.is_untested for one in first.verdicts][-1] is False  # there are no kernels from 64 on
        assert any(one.is_untested for one in first.verdicts)
        check(ring, model)
        ring.wait_status(
            lambda told: not any(v.is_untested for r in told.ranks for v in r.node.kernels.verdicts), 300
        )
        before = ring.node_status(1).kernels
        assert [one.is_taken for one in before.verdicts] == [True] * 6 + [False]
        check(ring, model)
        assert ring.node_status(1).kernels.num_calls > before.num_calls
        assert sum(ring.node_status(rank).kernels.num_tested for rank in range(3)) >= 1


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe_lite"])
def test_shared_experts_join_the_sum_and_the_ring_is_the_reference(name: str, tmp_path: Path) -> None:
    """With a factor of each token, and without; the second's first layer has no experts."""
    folder = write_zoo_checkpoint(name, tmp_path / name)
    env = {"MACRAME_KERNELS": "emulate"}
    with RingProcesses(tmp_path, folder, ranges(7, (2, 5)), env=env) as ring:
        ring.wait_ok(300)
        check(ring, folder, [[token % 128 for token in prompt] for prompt in PROMPTS])
        for rank in range(3):
            told = ring.node_status(rank).kernels
            joined = [one for one in told.verdicts if "; a shared expert of " in one.block]
            assert [one.is_taken for one in joined] == [True] * 6 + [False]  # not from 64 on
            assert told.num_calls > 4 * NUM_TOKENS * told.num_layers


def one_node_is_wrong(
    folder: Path, plain: Path, directory: Path, kernel: str
) -> tuple[control_pb2.KernelStatus, control_pb2.KernelStatus]:
    """What rank 1, whose kernel is wrong, and rank 2 say of theirs; the ring answers as `plain` does."""
    ring = RingProcesses(
        directory,
        folder,
        ranges(NUM_LAYERS, CUTS[3]),
        env={"MACRAME_KERNELS": "emulate"},
        faults={1: f"wrong_kernel={kernel}"},
    )
    with ring:
        ring.wait_ok(300)
        check(ring, plain)
        return ring.node_status(1).kernels, ring.node_status(2).kernels


@pytest.mark.parametrize("kernel", ["moe", "moe_down_sum"])
def test_a_kernel_that_is_wrong_is_found_out_and_not_used(model: Path, tmp_path: Path, kernel: str) -> None:
    """On one node alone: the others use theirs. moe.h has what stores gate and up."""
    wrong, right = one_node_is_wrong(model, model, tmp_path, kernel)
    one_token = wrong.verdicts[0]
    assert (one_token.first_tokens, one_token.is_taken) == (1, False)
    assert one_token.reason.startswith("wrong by ")
    assert one_token.error > 0.1
    assert right.verdicts[0].is_taken


def test_off_is_bit_for_bit_mlx_lm(model: Path, tmp_path: Path) -> None:
    env = {"MACRAME_KERNELS": "off"}
    with RingProcesses(tmp_path, model, ranges(NUM_LAYERS, CUTS[3]), env=env) as ring:
        ring.wait_ok()
        got = [t for reply in ring.generate(PROMPTS[0], NUM_TOKENS, logprobs=True) for t in reply.tokens]
        told = ring.node_status(1).kernels
    tokens, logprobs = greedy(model, PROMPTS[0], NUM_TOKENS)
    assert ([token.id for token in got], [token.logprob for token in got]) == (tokens, logprobs)
    assert (told.backend, told.reason, told.num_calls) == ("", "MACRAME_KERNELS is off", 0)


def test_an_exl3_model_is_the_reference_and_its_verdicts_are_kept(
    exl3: tuple[Path, Path], tmp_path: Path
) -> None:
    env = {"MACRAME_KERNELS": "emulate", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    folder, plain = exl3
    with RingProcesses(tmp_path, folder, ranges(NUM_LAYERS, CUTS[3]), env=env) as ring:
        ring.wait_status(lambda told: any(r.node.activity == "testing kernels" for r in told.ranks), 300)
        ring.wait_ok(300)
        check(ring, plain)
        for rank, (start, stop) in enumerate(ranges(NUM_LAYERS, CUTS[3])):
            told = ring.node_status(rank).kernels
            is_last = stop == NUM_LAYERS
            assert (told.backend, told.num_layers, told.reason) == ("emulated", 0, "")
            assert told.num_matrices == 7 * (stop - start) + is_last
            assert len(told.verdicts) == 4 * (4 + is_last)  # q and o; k and v; gate and up; down; the head
            assert all(one.is_taken and one.block.startswith("exl3 ") for one in told.verdicts)
            assert all(one.error < 1e-4 for one in told.verdicts)
            assert told.num_calls > 4 * NUM_TOKENS * (stop - start)
        before = ring.node_status(2).incarnation
        ring.kill(2)
        ring.start(2)
        ring.wait_status(lambda new: new.status == "ok" and new.ranks[2].node.incarnation != before, 300)
        assert ring.tokens(PROMPTS[0], NUM_TOKENS) == greedy(plain, PROMPTS[0], NUM_TOKENS)[0]
        again = ring.node_status(2).kernels
        assert (again.num_tested, again.num_calls > 0) == (0, True)


@pytest.mark.parametrize("kernel", ["exl3_decode", "exl3_unpack"])
def test_an_exl3_kernel_that_is_wrong_is_found_out_and_not_used(
    exl3: tuple[Path, Path], tmp_path: Path, kernel: str
) -> None:
    """On one node alone, and with it only the numbers of rows that this kernel is for."""
    wrong, right = one_node_is_wrong(*exl3, tmp_path, kernel)
    for one in wrong.verdicts:
        is_wrong = (one.last_tokens > 0) == (kernel == "exl3_decode")
        assert one.is_taken != is_wrong
        if is_wrong:
            assert one.reason.startswith("wrong by ")
            assert one.error > 0.1
    assert all(one.is_taken for one in right.verdicts)
