"""The file that keeps what the self-test of kernels found."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.source import make_wrong
from kernels.verdicts import Machine, Verdict, Verdicts, this_machine

MACHINE = Machine("Apple M4 Max", "Darwin 26.1", "0.32.4", "0123456789abcdef", "metal")
FOUND = (Verdict(1, 1, True, error=1e-4, ours_us=10.0, mlx_us=17.0, gb_s=210.0, num_launches=2),)
OTHERS = (Verdict(1, 0, False, "RuntimeError: no such function"),)


def test_they_are_kept_by_block(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "new", MACHINE)
    assert verdicts.find("a") is None
    verdicts.keep("a", FOUND)
    verdicts.keep("b", OTHERS)
    again = Verdicts(tmp_path / "new", MACHINE)
    assert (again.find("a"), again.find("b"), again.find("c")) == (FOUND, OTHERS, None)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".json"]


def test_nodes_that_keep_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: Verdicts(tmp_path, MACHINE).keep(name, FOUND), names))
    verdicts = Verdicts(tmp_path, MACHINE)
    assert [verdicts.find(name) for name in names] == [FOUND] * len(names)


@pytest.mark.parametrize(
    "change",
    [{"chip": "Apple M4"}, {"system": "Darwin 26.2"}, {"mlx": "0.33"}, {"kernels": "f" * 16}, {"version": 2}],
)
def test_another_machine_has_others(tmp_path: Path, change: dict[str, str]) -> None:
    Verdicts(tmp_path, MACHINE).keep("a", FOUND)
    assert Verdicts(tmp_path, replace(MACHINE, **change)).find("a") is None


def test_a_kernel_that_is_made_wrong_has_verdicts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node asks for the file's name before and after."""
    monkeypatch.setattr("kernels.source._wrong", set())
    before = this_machine("emulated")
    make_wrong("moe")
    assert this_machine("emulated").kernels != before.kernels


@pytest.mark.parametrize("text", ["", "[]", '{"machine": {}}', "{" * 100_000])
def test_a_file_that_cannot_be_read_is_made_again(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    verdicts = Verdicts(tmp_path, MACHINE)
    verdicts.keep("a", FOUND)
    next(tmp_path.iterdir()).write_text(text)
    assert verdicts.find("a") is None
    assert "cannot be used" in caplog.text
    verdicts.keep("a", OTHERS)
    assert verdicts.find("a") == OTHERS


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    Verdicts(tmp_path / "file", MACHINE).keep("a", FOUND)
    assert f"verdicts on kernels cannot be kept in {tmp_path}" in caplog.text


def test_nothing_is_kept_without_a_folder() -> None:
    verdicts = Verdicts(None, MACHINE)
    verdicts.keep("a", FOUND)
    assert verdicts.find("a") is None


def test_the_gain() -> None:
    assert FOUND[0].ratio == 1.7
    assert OTHERS[0].ratio == 0.0
    assert [Verdict(9, 16, True).covers(n) for n in (8, 9, 16, 17)] == [False, True, True, False]
    assert Verdict(64, 0, True).covers(10_000)


def test_this_machine() -> None:
    found = this_machine("emulated")
    assert (found.chip, found.backend, len(found.kernels)) == ("cpu", "emulated", 16)
