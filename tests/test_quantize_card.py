"""README.md of a quantised folder: it speaks of the new weights, and says of what they were made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import cluster.quantize_exl3
from tests.test_exl3_encode_linear import fast_search
from tests.test_quantize import a_model, run

CARD = """---
license: apache-2.0
language: [en, no]
base_model: someone/Plain-1B
library_name: mlx
tags: [chat, mlx, 8-bit]
---
# someone/Plain-1B-8bit

8.5 bits a weight.
"""


def parts_of(folder: Path) -> tuple[dict[str, object], str]:
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_of_an_affine_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model(tmp_path / "Plain-1B-8bit", quantize={"bits": 8, "group_size": 64})
    (model / "readme.MD").write_text(CARD)
    assert run(model, tmp_path / "out", "--bits", "4", "--format", "affine") == 0
    assert re.search(r" bits a weight with their scales, \d+ kB in all", capsys.readouterr().out)
    metadata, text = parts_of(tmp_path / "out")
    assert metadata == {
        "license": "apache-2.0",
        "language": ["en", "no"],
        "base_model": "someone/Plain-1B",
        "base_model_relation": "quantized",
        "tags": ["chat", "mlx", "4-bit"],
    }
    lines = text.strip().splitlines()
    assert lines[0] == "# Plain-1B-8bit, affine, 4 bits"
    assert lines[2].startswith("Made of Plain-1B-8bit (affine, 8 bits) with macrame ")
    assert lines[4] == "    macrame quantize --format affine --bits 4 --group-size 64 --model Plain-1B-8bit"
    at = lines.index("# someone/Plain-1B-8bit")
    assert any("what it says of bits, sizes and formats is of that one" in line for line in lines[:at])
    assert not (tmp_path / "out" / "readme.MD").exists()


@pytest.mark.long
@pytest.mark.parametrize("old", [None, "just words", "---\n: [\n---\nwords"])
def test_the_card_of_an_exl3_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None) -> None:
    """Of a source without a card, or with one that has no metadata, or none that can be read."""
    monkeypatch.setattr(cluster.quantize_exl3, "make_search", lambda: fast_search)
    model = a_model(tmp_path / "plain", unstack_experts=True)
    if old is not None:
        (model / "README.md").write_text(old)
    assert run(model, tmp_path / "out", "--bits", "3.5") == 0
    metadata, text = parts_of(tmp_path / "out")
    assert metadata == {"tags": ["exl3", "3.5-bit"]}
    assert "# plain, EXL3, 3.5 bits\n\nMade of plain (not quantised) with macrame" in text
    assert "    macrame quantize --format exl3 --bits 3.5 --head-bits 6 --model plain\n" in text
    assert text.rstrip().endswith("words") == (old is not None)
    if old is None:
        assert run(tmp_path / "out", tmp_path / "affine", "--bits", "4", "--format", "affine") == 0
        assert "Made of out (EXL3, 3.5 bits) with macrame" in parts_of(tmp_path / "affine")[1]
