"""The kernels of a loaded shard: tested on its own layers, and never in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kernels import expert_subject, moe, switch
from shard_loader import expert_kernels
from shard_loader.expert_kernels import choose_kernels, choose_more, distrust_kernels
from shard_loader.shard import Shard
from shard_loader.weights import load_shard
from tests.mlx_kernels import exl3_by_mlx, without_gpu
from tests.tiny_exl3 import write_exl3
from tests.tiny_models import write_checkpoint
from tests.zoo.checkpoint import write_zoo_checkpoint

CARRY = {"start": 1, "stop": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("qwen3_moe", tmp_path_factory.mktemp("moe") / "model", num_layers=5)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    monkeypatch.setattr(expert_subject, "CLASSES", ((1, 1), (2, 4)))


def outputs_of(shard: Shard, hidden: int = 64) -> list[mx.array]:
    state, found = shard.new_state(), []
    for num_tokens in (4, 1, 1, 4):
        carry = mx.random.normal((1, num_tokens, hidden), key=mx.random.key(num_tokens))
        found.append(shard.forward(mx.zeros((1, num_tokens), mx.int32), carry, state))
        mx.eval(found[-1])
    return found


def test_own_layers_are_tested_and_used(checkpoint: Path) -> None:
    shard, steps = load_shard(checkpoint, **CARRY), []
    wanted = outputs_of(shard)
    report = choose_kernels(shard, lambda: steps.append(1))
    assert report is not None
    assert (report.backend, report.num_layers, report.is_used) == ("emulated", 3, True)
    assert steps
    for found, one in zip(outputs_of(shard), wanted, strict=True):
        assert mx.allclose(found, one, rtol=1e-4, atol=1e-4)
    known = [switch.taken_of(layer) for layer in switch.expert_layers(shard.own_modules)]
    assert [one.num_fused for one in known if one is not None] == [3, 3, 3]
    kept = list(expert_kernels.verdict_folder().iterdir())
    assert len(kept) == 1


@pytest.mark.parametrize(("name", "num_layers"), [("nemotron_h", 1), ("phixtral", 7), ("kimi_k3", 6)])
def test_layers_of_other_forms_are_tested_and_used(name: str, num_layers: int, tmp_path: Path) -> None:
    """Up without a gate, and SiTU."""
    shard = load_shard(write_zoo_checkpoint(name, tmp_path / name), 0, 7)
    report = choose_kernels(shard)
    assert report is not None
    assert (report.num_layers, report.is_used, report.reasons) == (num_layers, True, [])
    assert [one.is_taken for verdicts in report.blocks.values() for one in verdicts] == [True, True]
    before = report.num_calls
    state = shard.new_state()
    for _ in range(2):
        mx.eval(shard.forward(mx.array([[3]]), None, state))
    assert report.num_calls == before + 2 * num_layers


def test_a_kernel_that_fails_on_the_device_is_distrusted(checkpoint: Path) -> None:
    """It shows when a step is evaluated and nothing can be built anew: that request fails, no other."""
    shard = load_shard(checkpoint, **CARRY)
    wanted = outputs_of(shard)
    report = choose_kernels(shard)
    assert report is not None
    distrust_kernels(shard, RuntimeError("[malloc] Unable to allocate"))
    distrust_kernels(shard, ValueError("moe_down_sum"))
    assert report.failures == []
    distrust_kernels(shard, RuntimeError("Unable to build metal library: custom_kernel_moe_down_sum_4"))
    assert report.failures == ["RuntimeError: Unable to build metal library: custom_kernel_moe_down_sum_4"]
    before = report.num_calls
    assert all(mx.array_equal(*pair) for pair in zip(outputs_of(shard), wanted, strict=True))
    assert report.num_calls == before


def test_what_the_start_had_no_time_for_is_chosen_later(checkpoint: Path) -> None:
    shard, steps = load_shard(checkpoint, **CARRY), []
    report = choose_kernels(shard, budget_s=0.0)
    assert report is not None
    assert (len(report.untested), report.num_tested) == (2, 0)
    choose_more(report, lambda: steps.append(1), lambda: True)
    assert (len(report.untested), steps) == (2, [1])  # left after the first piece
    choose_more(report, lambda: None, lambda: False)
    choose_more(report, lambda: None, lambda: False)
    assert (report.untested, report.num_tested) == ([], 1)
    outputs_of(shard)
    assert report.num_calls > 0


def test_a_failure_at_rest_ends_no_node(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    report = choose_kernels(load_shard(checkpoint, **CARRY), budget_s=0.0)
    assert report is not None

    def fails(*_: Any) -> None:
        raise OSError("the device is lost")

    monkeypatch.setattr(expert_kernels, "try_next", fails)
    choose_more(report, lambda: None, lambda: False)
    assert report.untested == []
    assert "no more kernels are tested: OSError: the device is lost" in caplog.text


def test_without_experts_there_is_nothing_to_say(tmp_path: Path) -> None:
    dense = write_checkpoint("llama", tmp_path / "model", num_layers=3)
    assert choose_kernels(load_shard(dense, 0, 2)) is None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("off", "MACRAME_KERNELS is off"),
        without_gpu("on", "MLX uses no GPU here"),
        ("fast", "ValueError: MACRAME_KERNELS is 'fast': say on, off or emulate."),
    ],
)
def test_without_a_backend_nothing_changes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asked: str, reason: str
) -> None:
    shard = load_shard(checkpoint, **CARRY)
    wanted = outputs_of(shard)
    monkeypatch.setenv("MACRAME_KERNELS", asked)
    report = choose_kernels(shard)
    assert report is not None
    assert (report.backend, report.num_layers, report.reasons) == ("", 3, [reason])
    assert all(mx.array_equal(*pair) for pair in zip(outputs_of(shard), wanted, strict=True))


def test_whatever_fails_the_shard_computes_as_before(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard = load_shard(checkpoint, **CARRY)
    wanted = outputs_of(shard)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("the device is lost")

    monkeypatch.setattr(expert_kernels, "self_test", fails)
    report = choose_kernels(shard)
    assert report is not None
    assert report.reasons == ["OSError: the device is lost"]
    assert "no kernels are used: OSError: the device is lost" in caplog.text
    assert all(mx.array_equal(*pair) for pair in zip(outputs_of(shard), wanted, strict=True))


def test_exl3_matrices_are_tested_kept_and_distrusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = write_exl3("llama", tmp_path / "models", num_layers=3)
    shard, steps = load_shard(folder, 1, 3), []
    exl3_by_mlx(monkeypatch)
    wanted = outputs_of(shard, 128)
    report = choose_kernels(shard, lambda: steps.append(1))
    assert report is not None
    assert (report.num_layers, report.num_matrices, report.reasons) == (0, 15, [])
    assert len(report.blocks) == report.num_tested == 3  # k and v; the head; all others
    assert all(one.is_taken for verdicts in report.blocks.values() for one in verdicts)
    assert len(steps) == 3 * 6
    before = report.num_calls
    for found, one in zip(outputs_of(shard, 128), wanted, strict=True):
        assert mx.allclose(found, one, rtol=1e-4, atol=1e-4)
    assert report.num_calls - before == 4 * 15
    again = choose_kernels(load_shard(folder, 1, 3))
    assert again is not None
    assert (again.num_tested, again.blocks) == (0, report.blocks)
    distrust_kernels(shard, RuntimeError("Unable to build metal library: custom_kernel_exl3_decode_4"))
    assert report.failures == ["RuntimeError: Unable to build metal library: custom_kernel_exl3_decode_4"]
    assert all(mx.array_equal(*pair) for pair in zip(outputs_of(shard, 128), wanted, strict=True))


def test_exl3_without_a_backend_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write_exl3("llama", tmp_path / "models", num_layers=3)
    monkeypatch.setenv("MACRAME_KERNELS", "off")
    report = choose_kernels(load_shard(folder, 0, 1))
    assert report is not None
    assert (report.backend, report.num_matrices, report.reasons) == ("", 7, ["MACRAME_KERNELS is off"])
