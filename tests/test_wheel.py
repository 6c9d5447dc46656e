"""The wheel that macrame makes of itself: the same bytes each time, and what pip's own build has in it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.errors import UserError
from deploy import wheel as module
from deploy.wheel import own_wheel, wheel_version

ROOT = Path(__file__).resolve().parent.parent
WHEEL_OF_ITSELF = (
    "from deploy.wheel import own_wheel; import pathlib, sys; own_wheel(pathlib.Path(sys.argv[1]))"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_wheel(tmp_path_factory.mktemp("wheel"))


def test_it_is_the_same_byte_for_byte(wheel: Path, tmp_path: Path) -> None:
    again = own_wheel(tmp_path / "new" / "folder")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()
    assert wheel_version(again) == wheel_version(wheel)


def test_another_line_of_code_is_another_version(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "checkout"
    for name in ("pyproject.toml", "LICENSE", "deploy/__init__.py", "deploy/demo/train.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).exists() else b"")
    monkeypatch.setattr(module, "__file__", str(copy / "deploy" / "wheel.py"))
    before = wheel_version(own_wheel(tmp_path))
    (copy / "deploy/demo/train.py").write_text("# another line\n")
    after = wheel_version(own_wheel(tmp_path))
    assert before != after
    assert before.partition("+")[0] == after.partition("+")[0]


def test_it_holds_the_packages_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        assert content.testzip() is None
        assert {entry.compress_type for entry in content.infolist()} == {zipfile.ZIP_STORED}
    assert {"cluster/run_node.py", "proto/ring.proto", "planner/chips.json", "deploy/cli.py"} <= names
    assert any(name.startswith("deploy/demo/model/") for name in names)
    assert not any(name.startswith("tests/") or "__pycache__" in name for name in names)


def test_its_metadata_is_that_of_the_project(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    found = PathDistribution(info)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found.version == project["version"]
    scripts = {e.name: e.value for e in found.entry_points if e.group == "console_scripts"}
    assert scripts == project["scripts"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    given = [Requirement(text) for text in found.requires or ()]
    assert [str(r) for r in given if "extra" not in str(r.marker)] == [str(r) for r in wanted]
    (cuda,) = [r for r in given if r.marker and "cuda13" in str(r.marker)]
    assert cuda.marker is not None
    assert cuda.marker.evaluate({"extra": "cuda13", "sys_platform": "linux"})
    assert not cuda.marker.evaluate({"extra": "cuda13", "sys_platform": "darwin"})
    assert not cuda.marker.evaluate({"extra": "", "sys_platform": "linux"})
    metadata = message_from_string((info / "METADATA").read_text())
    assert metadata.get_all("Provides-Extra") == list(project["optional-dependencies"])


def test_a_copy_without_pip_s_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "deploy" / "wheel.py"))
    with pytest.raises(UserError, match="was not installed by pip or uv"):
        own_wheel(tmp_path)


@pytest.mark.long
def test_an_installed_wheel_makes_the_same_wheel_again(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run(pip, check=True)
    # -P: not from this folder; the installed copy goes before whatever else is installed
    code = f"import sys; sys.path.insert(0, {str(place)!r}); {WHEEL_OF_ITSELF}"
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.long
def test_it_lists_the_files_that_pip_s_own_build_does(wheel: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with zipfile.ZipFile(wheel) as content:
        ours = sorted(content.namelist())
        content.extractall(source)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as content:
        assert sorted(content.namelist()) == ours
