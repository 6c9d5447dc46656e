"""How the demo model is made: its text, the trigram baseline, the dense training block, a few real steps."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe
from mlx_lm.utils import load_model

from deploy.demo import export, train
from deploy.demo.corpus import Corpus, functions_of, is_held_out, read_sources, train_tokenizer
from deploy.demo.trigram import Trigram

SOURCE = '''\
class A:
    @property
    def total(self):
        """Sum them."""
        # in order
        return sum(
            self.items)

    def test_total(self):
        assert A().total
        assert True
'''
TINY = train.CONFIG | {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


def test_functions_stand_alone_without_margin_docstring_and_tests() -> None:
    assert list(functions_of(SOURCE)) == [
        "@property\ndef total(self):\n    return sum(\n        self.items)\n"
    ]


def test_sources_are_distinct_and_valid(tmp_path: Path) -> None:
    (tmp_path / "encodings").mkdir()
    for name, text in {
        "a.py": "x = 1\n",
        "b.py": "x = 1\n\n",
        "c.py": "def",
        "d.py": "# coding: latin-1\ny = 'é'\n",
        "encodings/cp1.py": "z = 1\n",
    }.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert read_sources(tmp_path) == {"a.py": "x = 1\n", "d.py": "# coding: latin-1\ny = 'é'\n"}


def test_one_file_in_twenty_is_held_out() -> None:
    share = sum(is_held_out(f"package/module_{number}.py") for number in range(4000)) / 4000
    assert share == pytest.approx(1 / 20, rel=0.2)


def test_a_text_too_small_for_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fewer than vocab_size 4096"):
        train_tokenizer([SOURCE], 4096)


def test_trigram_is_a_distribution_and_knows_what_it_counted() -> None:
    tokens = np.array([1, 2, 3] * 50 + [4, 2, 5], dtype=np.uint16)
    model = Trigram(tokens, 8)
    w = np.arange(8)
    for u, v in ((1, 2), (4, 2), (7, 2), (7, 7), (2, 3)):
        p = model.probabilities(np.full(8, u), np.full(8, v), w)
        assert p.sum() == pytest.approx(1.0)
        assert p.min() > 0
    assert model.perplexity(tokens[:150]) < 1.1 < model.perplexity(np.array([5, 4, 6, 1, 7], dtype=np.uint16))


def test_dense_training_block_computes_what_mlx_lm_does() -> None:
    mx.random.seed(1)
    dense = train.build_model(TINY, dropout=0.0)
    plain = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(TINY))
    plain.load_weights(tree_flatten(dense.parameters()))
    tokens = mx.random.randint(0, 512, (2, 33))
    assert mx.allclose(dense(tokens), plain(tokens), atol=1e-4)


def test_a_few_steps_write_both_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SOURCE * 40
    tokenizer = train_tokenizer([json.__doc__ or "", text, Path(train.__file__).read_text()], 512)
    ids = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
    facts: dict[str, int | str] = {
        "python": "3", "num_train_files": 1, "train_bytes": len(text), "num_functions": 0,
        "num_held_out_files": 1, "held_out_bytes": len(text),
    }  # fmt: skip
    Corpus(ids, np.array([0], dtype=np.int64), ids, np.tile(ids, 4)[:1030], facts).save(
        tmp_path / "corpus.npz"
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(train, "CONFIG", TINY)
    monkeypatch.setattr(export, "FLOAT32_SHARD_BYTES", 600_000)
    monkeypatch.setattr(export, "SHARD_BYTES", 300_000)
    sizes = "--steps 6 --batch 4 --context 16 --eval-every 3 --eval-tokens 100 --layers 1 --rate 1e-2"
    train.main(["--work", str(tmp_path), "--out", str(tmp_path / "model"), *sizes.split()])

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    first, last = (float(line.split("held out ")[1].split(",")[0]) for line in lines)
    assert last < first
    for folder, bits in (("float32", None), ("model", 8)):
        assert len(list((tmp_path / folder).glob("*.safetensors"))) >= 2
        _, config = load_model(tmp_path / folder)
        assert config.get("quantization", {}).get("bits") == bits
    assert "| trigram |" in (tmp_path / "model" / "README.md").read_text()
