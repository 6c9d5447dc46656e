from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kernels.emulator.build import cache_folder
from shard_loader import proof_store
from shard_loader.cache_home import user_cache_dir
from shard_loader.cut_proof import CutProof, RowProof
from shard_loader.cuts import main, proofs_of
from shard_loader.proof_store import as_shipped, find, find_rows, pattern_of, save, save_rows
from shard_loader.rehearsal import Rehearsal
from tests.real_configs import REAL_CONFIGS
from tests.tiny_models import tiny_config

LLAMA = tiny_config("llama", 5)
EXACT = [CutProof(cut, True, 0.0, "") for cut in range(1, 5)]
MIXED = [*EXACT[:2], CutProof(3, False, 0.5, "wrong"), CutProof(4, False, None, "fails")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof_store, "_shipped", dict)
    return tmp_path


def test_what_was_saved_is_found() -> None:
    assert (find(LLAMA, None), find(LLAMA, [2, 3]), find(LLAMA, [])) == (None, None, [])
    save(LLAMA, None, "tiny", MIXED)
    assert find(LLAMA, None) == MIXED
    save(LLAMA, [1, 2], "tiny", EXACT[:2])
    assert find(LLAMA, [2, 1]) == EXACT[:2]


def test_cuts_that_are_exact_one_by_one_are_still_to_be_proven_together() -> None:
    save(LLAMA, None, "tiny", EXACT)
    assert find(LLAMA, [1, 3]) is None
    save(LLAMA, None, "tiny", MIXED)
    assert find(LLAMA, [1, 3]) == [MIXED[0], MIXED[2]]
    assert find(LLAMA, [1, 9]) is None


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"hidden_size": 512, "num_attention_heads": 32, "num_key_value_heads": 16}, True),
        ({"vocab_size": 50_000, "eos_token_id": 7, "torch_dtype": "float16"}, True),
        ({"quantization": {"bits": 4, "group_size": 64}, "vision_config": {"depth": 3}}, True),
        ({"num_hidden_layers": 6}, False),
        ({"layer_types": ["full_attention"] * 5}, False),
        ({"model_type": "qwen2"}, False),
        ({"rope_theta": 1.0}, False),
        ({"architectures": ["Other"]}, False),
    ],
)
def test_sizes_share_a_proof_and_patterns_do_not(change: dict[str, object], is_same: bool) -> None:
    save(LLAMA, None, "tiny", EXACT)
    assert (find(LLAMA | change, None) == EXACT) == is_same
    assert "model_type" in change or (pattern_of(LLAMA | change) == pattern_of(LLAMA)) == is_same


def test_a_proof_on_a_larger_model_holds_for_its_sizes_only() -> None:
    save(LLAMA, None, "scaled", EXACT)
    assert find(LLAMA, None) == EXACT
    assert find(LLAMA | {"eos_token_id": 7}, None) == EXACT
    assert find(LLAMA | {"hidden_size": 512}, None) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cuts": 3}', '{"cuts": [{"cut": 1}]}'])
def test_a_broken_file_is_no_proof(content: str, own_cache: Path) -> None:
    save(LLAMA, None, "tiny", EXACT)
    (file,) = own_cache.rglob("*.json")
    file.write_text(content)
    assert find(LLAMA, None) is None
    save(LLAMA, None, "tiny", EXACT)
    assert find(LLAMA, None) == EXACT
    assert list(own_cache.rglob("*.json")) == [file]
    assert list(file.parent.iterdir()) == [file]  # nothing half written is left


def test_a_cache_that_cannot_be_written_is_no_error(own_cache: Path) -> None:
    (own_cache / "macrame").write_text("a file, not a folder")
    save(LLAMA, None, "tiny", EXACT)
    assert find(LLAMA, None) is None


def test_another_version_asks_for_another_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    save(LLAMA, None, "tiny", EXACT)
    monkeypatch.setattr(proof_store, "_versions", lambda: ["mlx-lm 9.9"])
    assert find(LLAMA, None) is None


def test_what_is_shipped_counts_for_its_release_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = as_shipped(
        [(LLAMA, MIXED, RowProof(batched=True, forked=False, rewound=True, read_together=True))]
    )
    refused = {"3": "wrong", "4": "fails"}
    assert list(content["patterns"].values()) == [
        {
            "num_layers": 5,
            "refused": refused,
            "batched": True,
            "forked": False,
            "rewound": True,
            "read_together": True,
        }
    ]
    monkeypatch.setattr(proof_store, "_shipped", lambda: json.loads(json.dumps(content)))
    proofs = find(LLAMA, None)
    assert proofs is not None
    assert [(p.cut, p.exact, p.reason) for p in proofs] == [(p.cut, p.exact, p.reason) for p in MIXED]
    monkeypatch.setattr(proof_store, "mlx_lm_version", lambda: "9.9")
    assert find(LLAMA, None) is None


def test_what_rows_may_do_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_rows(LLAMA) is None
    save_rows(LLAMA, "tiny", RowProof(batched=False, forked=True, rewound=True, read_together=False))
    assert find_rows(LLAMA) == RowProof(batched=False, forked=True, rewound=True, read_together=False)
    content = as_shipped(
        [(LLAMA, MIXED, RowProof(batched=True, forked=False, rewound=True, read_together=True))]
    )
    monkeypatch.setattr(proof_store, "_shipped", lambda: content)
    assert find_rows(LLAMA) == RowProof(batched=True, forked=False, rewound=True, read_together=True)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Also that of the emulator, which may not ask shard_loader."""

    def lies_in(folder: Path) -> bool:
        return (user_cache_dir(), cache_folder()) == (folder / "macrame", folder / "macrame" / "emulated")

    assert lies_in(own_cache)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert lies_in(Path.home() / "Library" / "Caches")
    monkeypatch.setattr(sys, "platform", "linux")
    assert lies_in(Path.home() / ".cache")


def test_a_proof_is_kept_and_taken_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proofs_of(LLAMA, [2, 4]) == [EXACT[1], EXACT[3]]
    monkeypatch.setattr(Rehearsal, "__init__", lambda *_: pytest.fail("proven again"))
    assert proofs_of(LLAMA, [4, 2]) == [EXACT[1], EXACT[3]]


def test_what_cannot_be_judged_is_not_kept(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(Rehearsal, "error_of", lambda self, cuts: 0.5)
    monkeypatch.setattr(Rehearsal, "is_repeatable", lambda self: False)
    assert not proofs_of(LLAMA, [2])[0].exact
    assert not proofs_of({"model_type": "no_such_model"})[0].exact
    assert list(own_cache.rglob("*.json")) == []


def test_the_command_keeps_its_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main([str(tmp_path), "--cuts", "3"]) == 0
    assert capsys.readouterr().out == "before layer 3: exact\n"
    assert find(LLAMA, [3]) == [EXACT[2]]


@pytest.mark.parametrize("arch", REAL_CONFIGS)
def test_a_pattern_is_a_function_of_the_config(arch: str) -> None:
    config = REAL_CONFIGS[arch]
    assert pattern_of(config) == pattern_of(json.loads(json.dumps(config)))
    assert pattern_of(config) != pattern_of(config | {"num_hidden_layers": 3})
