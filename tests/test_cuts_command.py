from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cuts import main
from tests.tiny_models import tiny_config

LOOPED = tiny_config("llama", 4) | {"model_type": "nanbeige", "num_loops": 2}


def write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_an_exact_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, tiny_config("llama", 4) | {"rope_theta": 77.0})
    assert main(["--model", folder]) == 0
    printed = capsys.readouterr()
    head, line = printed.out.splitlines()
    assert head.startswith(f"{folder}: llama, 4 layers, mlx-lm ")
    assert line == "exact at every cut"
    assert "cutting it before 3 of its 4 layers at once" in printed.err
    assert main(["--model", folder]) == 0
    assert capsys.readouterr() == (printed.out, "")  # proven before


def test_a_model_for_one_node_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", write(tmp_path, LOOPED)]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("one node only: layer 0 runs 2 times a pass, so the model cannot be cut\n")
    assert "before layer 3 alone" in printed.err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, LOOPED)
    assert main(["--model", folder, "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["model"], data["model_type"], data["num_layers"]) == (folder, "nanbeige", 4)
    assert (data["legal_cuts"], [cut["cut"] for cut in data["cuts"]]) == ([], [1, 2, 3])


def test_what_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "nowhere")]) == 3
    assert "macrame cuts: there is no model folder" in capsys.readouterr().err
    assert main(["--model", "nobody/nothing"]) == 3
    assert capsys.readouterr().err.startswith("macrame cuts: nobody/nothing is not in the local cache")
    (tmp_path / "config.json").write_text("{")
    assert main(["--model", str(tmp_path)]) == 3
    assert "config.json" in capsys.readouterr().err
