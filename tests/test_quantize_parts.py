"""The unfinished output of macrame quantize: who writes it, its room on the disk, what a stop leaves."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import cluster.quantize_affine
import cluster.quantize_exl3
from cluster.errors import UserError
from cluster.quantize_exl3 import choose_layers
from cluster.quantize_parts import Parts, claimed
from cluster.quantize_source import load_plain, read_source
from tests.disks import small_disk
from tests.test_exl3_encode_linear import fast_search
from tests.test_quantize import a_model, a_text, run, tensors
from tests.waiting import wait_for


def test_two_runs_into_one_output_and_the_parts_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one is refused; what a stopped EXL3 run left is nothing that affine may remove."""
    model, output = a_model(tmp_path / "model"), tmp_path / "out"
    with claimed(output) as partial:
        for form in ("exl3", "affine"):
            assert run(model, output, "--bits", "3", "--format", form) == 1
            assert "another macrame quantize writes" in capsys.readouterr().err
    assert not partial.exists()
    partial.mkdir()
    (partial / "settings.json").write_text("{}")
    (partial / "layer.safetensors").write_text("hours of work")
    assert run(model, output, "--bits", "4", "--format", "affine") == 3
    assert "holds a stopped EXL3 run: repeat that one's command" in capsys.readouterr().err
    assert {file.name for file in partial.iterdir()} == {"settings.json", "layer.safetensors"}


def test_room_is_what_the_parts_and_the_result_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the layers and what stays as it is; not the source's size, of which little stays."""
    needed: list[int] = []
    monkeypatch.setattr("cluster.quantize_parts._check_room", lambda _, nbytes: needed.append(nbytes))
    monkeypatch.setattr(cluster.quantize_exl3, "make_search", lambda: None)
    model = a_model(tmp_path / "model", unstack_experts=True)
    assert run(model, tmp_path / "out", "--bits", "2", "--head-bits", "2") == 1
    assert "TypeError" in capsys.readouterr().err  # None searches nothing: the room is all that is wanted
    source = read_source(model, is_for_exl3=True)
    layers = choose_layers(load_plain(source), source.headers, Fraction(2), 2)
    stay = [a for name, a in tensors(model).items() if name.removesuffix(".weight") not in layers]
    parts = 2 * sum(layer.nbytes for layer in layers.values())
    assert needed == [parts + sum(array.nbytes for array in stay)]


@pytest.mark.long
@pytest.mark.parametrize("when", ["parts", "assemble"])
def test_a_disk_that_fills_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Exit code 2 and what is missing, nothing half-written; with room the command goes on behind it."""
    monkeypatch.setattr(cluster.quantize_exl3, "make_search", lambda: fast_search)
    plain, disk = a_model(tmp_path / "plain"), tmp_path / "disk"
    assert run(plain, tmp_path / "whole", "--bits", "3") == 0
    with small_disk(disk, 2):
        assert run(plain, disk / "out", "--bits", "3") == 0
        shutil.rmtree(disk / "out")
        hog = disk / "hog"
        write, assemble = Parts.write, Parts.assemble

        def fill(keep_bytes: int) -> None:
            with hog.open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - keep_bytes))

        def filled_write(parts: Parts, name: str, tensors: dict[str, mx.array]) -> None:
            if len(list(parts.folder.glob("*.safetensors"))) == 3:
                fill(4096)
            write(parts, name, tensors)

        def filled_assemble(parts: Parts, *args: Any) -> int:
            fill(65536)
            return assemble(parts, *args)

        with pytest.MonkeyPatch.context() as patch:
            if when == "parts":
                patch.setattr(Parts, "write", filled_write)
            else:
                patch.setattr(Parts, "assemble", filled_assemble)
            assert run(plain, disk / "out", "--bits", "3") == 2
        said = capsys.readouterr().err
        assert said.count("macrame quantize: ") == 1
        assert re.search(r"lacks \d+ kB of the \d+ kB that are still to be written: make room and", said)
        assert not (disk / "out").exists()
        left = {file.name for file in (disk / "out.partial").iterdir()}
        assert left >= {"settings.json"}
        assert not left & {"model", "writing.safetensors"}
        assert run(plain, disk / "out", "--bits", "3") == 2  # as soon as it looks
        assert "it goes on where it stopped" in capsys.readouterr().err
        hog.unlink()
        assert run(plain, disk / "out", "--bits", "3", "--json") == 0
        assert json.loads(capsys.readouterr().out)["num_resumed"] == (3 if when == "parts" else len(left) - 1)
        for file in (tmp_path / "whole").iterdir():
            assert file.read_bytes() == (disk / "out" / file.name).read_bytes(), file.name


def test_a_disk_that_fills_while_affine_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, disk = a_model(tmp_path / "plain"), tmp_path / "disk"
    save_model = cluster.quantize_affine.save_model

    def filled(*args: Any) -> None:
        (disk / "hog").write_bytes(bytes(shutil.disk_usage(disk).free - 4096))
        save_model(*args)

    monkeypatch.setattr(cluster.quantize_affine, "save_model", filled)
    with small_disk(disk, 2):
        assert run(plain, disk / "out", "--bits", "4", "--format", "affine") == 2
        assert re.search(r"\d+ kB are missing: make room and repeat the command", capsys.readouterr().err)
        assert [file.name for file in disk.iterdir() if file.name != "text.txt"] == ["hog"]


def test_a_disk_without_room_for_the_settings(tmp_path: Path) -> None:
    """It filled up behind the look at its room: nothing is left there."""
    disk = tmp_path / "disk"
    with small_disk(disk):
        with claimed(disk / "out") as partial:
            (disk / "hog").write_bytes(bytes(shutil.disk_usage(disk).free))
            parts = Parts(disk / "out", {"model": "m" * 5000})
            with pytest.raises(UserError, match="make room and repeat the command") as raised:
                parts.open(0)
        assert raised.value.exit_code == 2
        assert not partial.exists()


def test_a_folder_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    with claimed(tmp_path / "out") as partial:
        parts = Parts(tmp_path / "out", {})
        parts.open(1)
        shutil.rmtree(partial)
        with pytest.raises(UserError, match=r"cannot be written .*: repeat the command") as raised:
            parts.write("layer", {"layer.trellis": mx.arange(4096)})
    assert raised.value.exit_code == 1


def test_a_part_that_a_power_cut_left_is_encoded_again(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"):
        parts = Parts(tmp_path / "out", {})
        parts.open(1)
        parts.write("layer", {"layer.trellis": mx.arange(4096)})
        (file,) = parts.folder.glob("*.safetensors")
        whole = file.read_bytes()
        for size in (len(whole) - 100, 10, 0):
            file.write_bytes(whole[:size])
            assert parts.find("layer") is None
        file.write_bytes(whole)
        assert mx.array_equal((parts.find("layer") or {})["layer.trellis"], mx.arange(4096))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_killed_process_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """The real search, SIGKILL as soon as some layers are done, and the command once more."""
    plain = a_model(tmp_path / "plain")
    text = a_text(tmp_path)

    def command(output: str) -> list[str]:
        options = ["--bits", "3", "--calibration", str(text), "--calibration-tokens", "1024"]
        return [sys.executable, "-m", "deploy.quantize", "--model", str(plain), "--output", output, *options]

    killed = tmp_path / "killed"
    process = subprocess.Popen(command(str(killed)))
    parts = tmp_path / "killed.partial"
    wait_for(
        lambda: process.poll() is not None or len(list(parts.glob("*.safetensors"))) >= 3, 300, "three layers"
    )
    assert process.poll() is None, "it was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    subprocess.run(command(str(killed)), check=True)
    subprocess.run(command(str(tmp_path / "whole")), check=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (killed / file.name).read_bytes(), file.name
