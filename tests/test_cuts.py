from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from shard_loader.cut_proof import CutProof
from shard_loader.cuts import main, prove_cuts
from shard_loader.rehearsal import Rehearsal, RehearsalError
from shard_loader.shrink import NUM_EXPERTS, VOCAB_SIZE, WINDOW, recipes
from tests.real_configs import REAL_CONFIGS
from tests.tiny_models import tiny_config

# One of each kind: plain, sliding windows, recurrent, experts, experts with sinks. The long run has them all.
EACH_KIND = ("llama", "gemma3_text", "mamba2", "olmoe", "gpt_oss", "kimi_k3")


@pytest.fixture(autouse=True)
def on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=[] if arch in EACH_KIND else [pytest.mark.long])
        for arch in REAL_CONFIGS
        if arch != "deepseek_v3"  # which has its own test
    ],
)
def test_uneven_cuts_of_a_published_config_are_exact(arch: str) -> None:
    config = REAL_CONFIGS[arch]
    n = config.get("text_config", config).get("num_hidden_layers") or Rehearsal(config).num_layers
    cuts = sorted({max(1, n // 5), n // 2, n - 1})
    assert prove_cuts(config, cuts) == [CutProof(cut, True, 0.0, "") for cut in cuts]


@pytest.mark.long
def test_sixty_one_layers_take_seconds() -> None:
    started = time.process_time()
    assert all(proof.exact for proof in prove_cuts(REAL_CONFIGS["deepseek_v3"], [7, 20, 33, 46, 60]))
    assert time.process_time() - started < 30


GEMMA4 = REAL_CONFIGS["gemma4_text"] | {"num_hidden_layers": 10, "num_kv_shared_layers": 4}
GEMMA3N = {
    "model_type": "gemma3n",
    "text_config": REAL_CONFIGS["gemma3n"]["text_config"]
    | {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 4,
        "intermediate_size": [8192] * 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "activation_sparsity_pattern": [0.95] * 4 + [0.0] * 6,
    },
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(GEMMA3N, id="gemma3n"),
        pytest.param(GEMMA4, id="gemma4_text", marks=pytest.mark.long),  # the command's, and test_crossing's
    ],
)
def test_cuts_behind_shared_keys_and_values(config: dict[str, Any]) -> None:
    """Layers from 6 on read the keys and values of layers 4 (full attention) and 5 (sliding)."""
    assert prove_cuts(config) == [CutProof(cut, True, 0.0, "") for cut in range(1, 10)]
    assert prove_cuts(config, [3, 8]) == [CutProof(cut, True, 0.0, "") for cut in (3, 8)]


LOOPED = tiny_config("llama", 7) | {"model_type": "nanbeige", "num_loops": 2}
UNCUTTABLE = "layer 0 runs 2 times a pass, so the model cannot be cut"


def test_layers_that_run_twice_are_not_cut_apart() -> None:
    assert prove_cuts(LOOPED) == [CutProof(cut, False, None, UNCUTTABLE) for cut in range(1, 7)]
    assert prove_cuts(LOOPED | {"num_loops": 1}) == [CutProof(cut, True, 0.0, "") for cut in range(1, 7)]


def test_every_cut_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    error_of = Rehearsal.error_of
    monkeypatch.setattr(Rehearsal, "error_of", lambda self, cuts: asked.append(cuts) or error_of(self, cuts))
    proofs = prove_cuts(tiny_config("gpt_oss", 7))
    assert proofs == [CutProof(cut, True, 0.0, "") for cut in range(1, 7)]
    assert asked == [[1, 2, 3, 4, 5, 6]]


def test_the_exact_ones_of_several_cuts_are_proven_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def error_of(_: Rehearsal, cuts: Sequence[int]) -> float:
        asked.append(list(cuts))
        return 0.5 * (3 in cuts)

    monkeypatch.setattr(Rehearsal, "error_of", error_of)
    proofs = prove_cuts(tiny_config("llama", 5))
    assert [proof.exact for proof in proofs] == [True, True, False, True]
    assert asked == [[1, 2, 3, 4], [1], [2], [3], [4], [1, 2, 4]]


@pytest.mark.parametrize("cuts", [[0], [7], [9], [-1], [3, 12]])
def test_cuts_outside_the_model_are_refused(cuts: list[int]) -> None:
    proofs = prove_cuts(tiny_config("llama", 7), cuts)
    assert not any(proof.exact for proof in proofs)
    assert "does not lie between the model's 7 layers" in proofs[0].reason


def test_a_vocabulary_smaller_than_the_shrunk_one_is_kept() -> None:
    rehearsal = Rehearsal(tiny_config("llama", 7) | {"vocab_size": 11})
    assert rehearsal._expected[((12, 1, 1, 1), 1)][0].shape == (1, 12, 11)
    assert rehearsal.is_repeatable()
    assert all(tokens.max().item() < 11 for tokens in rehearsal._chunks((500,), 2))


def test_no_cuts_need_no_proof() -> None:
    assert prove_cuts(tiny_config("llama", 7), []) == []


def test_an_architecture_that_cannot_be_built_says_why() -> None:
    config = tiny_config("llama", 7) | {"hidden_size": "wide"}
    [proof] = prove_cuts(config, [3])
    assert (proof.exact, proof.max_error) == (False, None)
    assert proof.reason.startswith("no tiny model of this config can be built (tiny: ")
    assert prove_cuts({"model_type": "no_such_model"})[0].exact is False


def test_a_model_that_does_not_repeat_itself_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "error_of", lambda self, cuts: 0.5)
    [proof] = prove_cuts(tiny_config("llama", 7), [3])
    assert proof == CutProof(3, False, 0.5, "the logits differ by 0.5 from the whole model's")
    monkeypatch.setattr(Rehearsal, "is_repeatable", lambda self: False)
    [proof] = prove_cuts(tiny_config("llama", 7), [3])
    assert proof == CutProof(3, False, None, "the whole model does not give the same numbers twice here")


def test_a_proof_that_cannot_fail_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Rehearsal(tiny_config("llama", 7)).is_felt_at(3)
    monkeypatch.setattr(Rehearsal, "is_felt_at", lambda self, cut: False)
    proofs = prove_cuts(tiny_config("llama", 7), [3, 4])
    assert {proof.reason for proof in proofs} == {
        "a wrong carry changes nothing in the tiny model, so its numbers prove nothing"
    }
    assert not any(proof.exact for proof in proofs)


def test_cuts_that_are_only_exact_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rehearsal, "error_of", lambda self, cuts: 0.25 * (len(cuts) > 1))
    proofs = prove_cuts(tiny_config("llama", 7), [2, 4])
    assert [proof.cut for proof in proofs] == [2, 4]
    assert all(
        proof.reason.startswith("exact alone, but not together with the other cuts") for proof in proofs
    )


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's own test: a stage that is off by one bit is caught."""
    rehearsal = Rehearsal(tiny_config("llama", 7))
    assert rehearsal.error_of([3]) == 0.0
    assert rehearsal.is_repeatable()
    key = next(iter(rehearsal._expected))
    exact = rehearsal._expected[key][-1]
    rehearsal._expected[key][-1] = mx.where(mx.arange(exact.shape[-1]) == 5, exact * (1 + 2**-20), exact)
    assert 0 < rehearsal.error_of([3]) < 1e-3
    assert not rehearsal.is_repeatable()


@pytest.mark.parametrize("arch", REAL_CONFIGS)
def test_shrinking_keeps_layers_and_pattern(arch: str) -> None:
    config = REAL_CONFIGS[arch]
    kept = (
        "num_hidden_layers",
        "layer_types",
        "no_rope_layers",
        "first_k_dense_replace",
        "num_kv_shared_layers",
    )
    for _, small in recipes(config):
        for whole, part in ((config, small), (config.get("text_config", {}), small.get("text_config", {}))):
            for key in kept:
                assert part.get(key) == whole.get(key)
    assert "quantization_config" not in small
    name, tiny = next(recipes(config))
    assert name == "tiny"
    inner = tiny.get("text_config", tiny)
    assert inner.get("vocab_size", 0) <= VOCAB_SIZE
    assert (inner.get("sliding_window") or 0) <= WINDOW
    assert (
        max(inner.get(key) or 0 for key in ("num_experts", "n_routed_experts", "num_local_experts"))
        <= NUM_EXPERTS
    )


def test_shrinking_keeps_what_modules_need_of_each_other() -> None:
    tiny = {arch: next(recipes(config))[1] for arch, config in REAL_CONFIGS.items()}
    for arch in ("llama", "phi3", "olmoe"):
        heads, kv_heads = tiny[arch]["num_attention_heads"], tiny[arch]["num_key_value_heads"]
        assert (heads > kv_heads) == (
            REAL_CONFIGS[arch]["num_attention_heads"] > REAL_CONFIGS[arch]["num_key_value_heads"]
        )
        assert tiny[arch]["hidden_size"] == heads * 16
    assert len(tiny["phi3"]["rope_scaling"]["long_factor"]) == 8
    assert tiny["gemma3_text"]["num_key_value_heads"] == 1
    assert REAL_CONFIGS["phi3"]["rope_scaling"]["long_factor"][0] == 1.2
    assert len(REAL_CONFIGS["phi3"]["rope_scaling"]["long_factor"]) == 48  # the given config is not touched


def test_a_config_without_a_runnable_model_raises() -> None:
    with pytest.raises(RehearsalError, match="no tiny model of this config can be built"):
        Rehearsal({"model_type": "bitnet"})


def run_cli(folder: Path, *args: str) -> tuple[int, str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "MLX_DISABLE_COMPILE"}
    done = subprocess.run(
        [sys.executable, "-m", "shard_loader.cuts", str(folder), *args],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    folder = write_config(tmp_path, GEMMA4)
    code, out, _ = run_cli(folder, "--cuts", "3,8", "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed["model"] == str(folder)
    assert printed["cuts"] == [{"cut": cut, "exact": True, "max_error": 0.0, "reason": ""} for cut in (3, 8)]
    code, out, _ = run_cli(write_config(tmp_path, LOOPED), "--cuts", "3", "--json")
    assert code == 1
    assert json.loads(out)["cuts"] == [{"cut": 3, "exact": False, "max_error": None, "reason": UNCUTTABLE}]


def test_the_command_prints_a_line_per_cut(tmp_path: Path) -> None:
    code, out, _ = run_cli(write_config(tmp_path, tiny_config("llama", 7)), "--cuts", "5,2")
    assert (code, out) == (0, "before layer 2: exact\nbefore layer 5: exact\n")


@pytest.mark.parametrize("args", [["--cuts", "three"], ["--cut", "3", "--cots"], []])
def test_wrong_arguments_and_folders_exit_with_3(
    args: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), *args]) == 3
    error = capsys.readouterr().err
    assert "config.json is missing" in error or "usage:" in error
