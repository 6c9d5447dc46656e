"""The Metal source that MLX generates for every kernel is the committed one, which the emulator runs too."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.ladder import golden
from kernels.ladder.__main__ import main
from kernels.ladder.cases import all_cases


def test_the_generated_sources_are_the_committed_ones() -> None:
    assert golden.differences([case for case in all_cases() if case.is_golden]) == []


@pytest.mark.long
def test_mlx_makes_of_every_case_what_the_emulator_runs() -> None:
    assert golden.differences([case for case in all_cases() if not case.is_full]) == []


def test_a_changed_source_is_seen_and_written_anew(tmp_path: Path) -> None:
    cases = [case for case in all_cases() if case.is_golden][:1]
    num_files = golden.write(cases, tmp_path)
    assert golden.differences(cases, tmp_path) == []
    changed, *_ = files = sorted(tmp_path.glob("*.metal"))
    assert len(files) == num_files
    changed.write_text(changed.read_text().replace("uint i = ", "int i = "))
    (tmp_path / "old.metal").write_text("")
    assert golden.differences(cases, tmp_path) == [
        "old.metal: no case makes it any more",
        f"{changed.name}: differs from line 17 on",
    ]
    changed.unlink()
    assert f"{changed.name}: is missing" in golden.differences(cases, tmp_path)
    golden.write(cases, tmp_path)
    assert golden.differences(cases, tmp_path) == []


def test_no_case_of_a_name_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--only", "no such kernel"]) == 1
    assert "No case has 'no such kernel' in its name." in capsys.readouterr().err
