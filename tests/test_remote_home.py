"""Installing on another machine, against a real sshd and the real index: first, again, and refused."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import EXIT_ERROR, UserError
from deploy import ssh_master
from deploy.remote_home import KEPT_ENVIRONMENTS, RemoteHome, prepare
from deploy.remote_trouble import why_not_installed, why_not_usable
from deploy.ssh import Ssh
from deploy.wheel import own_wheel, wheel_version
from tests.disks import small_disk
from tests.namespaces import base_python
from tests.ssh_host import SshHost, ssh_host
from tests.ssh_machines import fetched

LINKS = Path("links")
SAID = [
    (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
        None,
        "is full",
    ),
    ("error: No space left on device (os error 28)", None, "1.3 GB were left"),
    ("ERROR: No matching distribution found for mlx>=0.32.4", LINKS, "links lack mlx>=0.32.4 for the Python"),
    ("  x Because zeroconf was not found in the provided package locations", LINKS, "lack zeroconf for"),
    (
        "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found for mlx",
        None,
        "cannot reach the package index (ERROR: No matching distribution found for mlx)",
    ),
    ("error: Request failed\n  dns error: failed to lookup", None, "--find-links FOLDER"),
    ("ERROR: first\nERROR: second\n", None, "installed on box: ERROR: first"),
    ("", None, "installed on box: it gave no reason"),
]


@pytest.mark.parametrize(("err", "links", "told"), SAID)
def test_each_failed_installation_has_its_sentence(err: str, links: Path | None, told: str) -> None:
    sentence = why_not_installed("box", "Linux x86_64", err, "1300000", links)
    assert told in sentence
    assert "\n" not in sentence


def test_a_home_without_room_and_one_that_may_not_be_written_are_told() -> None:
    assert "the disk of box is full" in why_not_usable("box", "~/.macrame", "No space left on device")
    told = why_not_usable("box", "~/.macrame", "mkdir: cannot create directory: Read-only file system")
    assert told.startswith("~/.macrame cannot be written on box (mkdir: cannot create directory: Read-only")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[SshHost]:
    """A machine whose python3.11 (or so) is the one below this environment."""
    (tmp_path / "host").mkdir()
    with ssh_host(tmp_path / "host", path=f"{base_python().parent}:/usr/bin:/bin") as running:
        yield running


def refusal(host: SshHost, wheel: Path, **more: Path) -> str:
    with Ssh("box", options=host.options) as ssh, pytest.raises(UserError) as raised:
        prepare(ssh, wheel, show=lambda text: None, **more)
    assert raised.value.exit_code == EXIT_ERROR
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_it_is_installed_once_over_what_an_earlier_try_left(host: SshHost, wheel: Path) -> None:
    version = wheel_version(wheel)
    name = version.partition("+")[2]
    folder = host.home / ".macrame" / "env"
    (folder / name).mkdir(parents=True)
    (folder / name / "half").write_text("installed")
    with subprocess.Popen(["true"]) as gone:
        pass
    (folder / f"{name}.lock").mkdir()
    (folder / f"{name}.lock" / "pid").write_text(f"{gone.pid}\n")
    said: list[str] = []
    with Ssh("box", options=host.options) as ssh:
        home = prepare(ssh, wheel, show=said.append)
        assert home == RemoteHome(
            root=str(host.home / ".macrame"),
            python=str(folder / name / "bin" / "python"),
            version=version,
            system=home.system,
        )
        assert home.system.split()[0] in ("Linux", "Darwin")
        assert [text.split()[0] for text in said] == ["copying", "installing"]
        assert sorted(p.name for p in folder.iterdir()) == [name]
        assert not (folder / name / "half").exists()
        assert (host.home / ".macrame" / "rings").stat().st_mode & 0o077 == 0
        told = ssh.check(
            f"{home.python} -m cluster.run_node --version; {home.python} -m deploy.cli --version"
        )
        number = version.partition("+")[0]
        assert told == f"macrame {number}\nmacrame {number}\n"
        again = subprocess.run([home.python, "-c", WHEEL, str(host.folder)], check=True, cwd="/")
        assert again.returncode == 0
        assert (host.folder / wheel.name).read_bytes() == wheel.read_bytes()
        said.clear()
        assert prepare(ssh, wheel, show=said.append) == home
        assert said == []
        (folder / name / "bin" / "python").unlink()  # as where the system's Python was replaced
        old = [folder / f"old{number}" for number in range(KEPT_ENVIRONMENTS)]
        for place in old:
            place.mkdir()
            (place / "complete").write_text("")
        assert prepare(ssh, wheel, show=said.append) == home
        assert [text.split()[0] for text in said] == ["copying", "installing"]
        assert len([p for p in folder.iterdir() if p.is_dir()]) == KEPT_ENVIRONMENTS
        assert Path(home.python).exists()


WHEEL = "from deploy.wheel import own_wheel; import pathlib, sys; own_wheel(pathlib.Path(sys.argv[1]))"


@pytest.mark.long
def test_a_machine_without_python_and_uv_is_told_what_to_install(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh_master, "MORE_PATH", "/nowhere")
    tools = tools_without_python(tmp_path)
    (tmp_path / "host").mkdir()
    with ssh_host(tmp_path / "host", path=str(tools)) as host:
        told = refusal(host, wheel)
        assert told.startswith("box has neither Python 3.11 or newer nor uv: install one of them there")
        script(tools / "python3", 'case "$2" in *print*) echo 3.9.6;; *) exit 1;; esac')
        assert f"Python 3.11 or newer (only 3.9.6 at {tools}/python3) nor uv" in refusal(host, wheel)
        script(tools / "python3.12", 'case "$2" in *ensurepip*) exit 1;; *print*) echo 3.12.1;; esac')
        told = refusal(host, wheel)
        assert told.startswith(f"{tools}/python3.12 on box lacks the venv module")
        assert "sudo apt install python3-venv" in told


@pytest.mark.long
def test_a_home_that_is_a_file_is_told(host: SshHost, wheel: Path) -> None:
    (host.home / ".macrame").write_text("")
    assert refusal(host, wheel).startswith("~/.macrame cannot be written on box (mkdir: ")


@pytest.mark.long
@pytest.mark.parametrize("megabytes", [1, 20])
def test_a_full_disk_is_told_and_nothing_half_done_is_left(
    host: SshHost, wheel: Path, megabytes: int
) -> None:
    """Full with the wheel itself, and full in the middle of the installation."""
    with small_disk(host.home / ".macrame", megabytes):
        told = refusal(host, wheel)
        assert told.startswith("the disk of box is full: ")
        if megabytes > 1:
            assert "0.0 GB were left" in told
        assert list((host.home / ".macrame" / "env").iterdir()) == []


@pytest.mark.long
def test_wheels_that_lack_something_are_told(host: SshHost, wheel: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    assert refusal(host, wheel, find_links=links) == f"{links} holds no wheels (.whl) to carry along"
    with zipfile.ZipFile(links / "other-1.0-py3-none-any.whl", "w") as other:
        other.writestr("other.py", "")
    told = refusal(host, wheel, find_links=links)
    assert told.startswith(f"the wheels in {links} lack mlx")
    assert "'pip download'" in told


@pytest.mark.long
@pytest.mark.timeout(600)
def test_uv_is_preferred_where_it_is(host: SshHost, wheel: Path, tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    (host.home / ".local/bin").mkdir(parents=True)
    (host.home / ".local/bin/uv").symlink_to(uv)
    said: list[str] = []
    with Ssh("box", options=host.options) as ssh:
        links = fetched(wheel, tmp_path / "links")
        home = prepare(ssh, wheel, show=said.append, find_links=links)
        assert "with uv (" in said[-1]
        assert ssh.check(f"{home.python} -m cluster.run_node --version").startswith("macrame ")


def tools_without_python(folder: Path) -> Path:
    """A folder of all programs that the scripts need and no interpreter."""
    place = folder / "tools"
    place.mkdir()
    for name in ("sh", "dd", "mkdir", "rm", "uname", "cat", "touch", "chmod"):
        found = shutil.which(name)
        assert found is not None
        (place / name).symlink_to(found)
    return place


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
