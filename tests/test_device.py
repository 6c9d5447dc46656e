"""Which device a node computes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from cluster.config import ConfigError, load_config
from cluster.device import choose_device
from cluster.errors import EXIT_USAGE, UserError
from cluster.probe import seen_machine


def config(path: Path, device: str) -> Path:
    file = path / "cluster.json"
    file.write_text(
        f'{{"model": "x", "nodes": [{{"host": "127.0.0.1", "memory_gb": 4, "device": {device}}}]}}'
    )
    return file


def test_the_file_names_one_of_two_or_none(tmp_path: Path) -> None:
    for text, device in (('"cpu"', "cpu"), ('"gpu"', "gpu"), ("null", None)):
        assert load_config(config(tmp_path, text)).nodes[0].device == device
    with pytest.raises(ConfigError, match=r'nodes\[0\]\.device.*must be "cpu" or "gpu"'):
        load_config(config(tmp_path, '"cuda"'))


@pytest.mark.skipif(mx.metal.is_available() or mx.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="MLX finds no GPU on this machine") as refused:
        choose_device("gpu", "cluster.json: nodes[1]")
    assert refused.value.exit_code == EXIT_USAGE


def test_a_node_on_the_cpu_is_planned_as_one() -> None:
    machine = seen_machine("cpu")
    assert "NVIDIA" not in machine.chip
    assert machine.memory_bytes > 0


def test_the_choice_holds_for_all_threads() -> None:
    code = (
        "import threading, mlx.core as mx\n"
        "from cluster.device import choose_device\n"
        "choose_device('cpu', 'x')\n"
        "seen = []\n"
        "thread = threading.Thread(target=lambda: seen.append(mx.default_device()))\n"
        "thread.start(); thread.join()\n"
        "assert seen == [mx.Device(mx.cpu, 0)], seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
