"""`macrame service`: what it writes below another root, what it runs, what it refuses. One thread.

Where a test lets it run the system's commands, scripts stand in their place and write them down.
"""

from __future__ import annotations

import json
import os
import plistlib
import re
import stat
from pathlib import Path

import pytest

from deploy import service, service_apply, service_launchd, service_node, service_systemd
from deploy.service import main
from deploy.service_node import account_of, check_start, fleeting_path, privacy_warning
from tests.services import LAUNCHCTL_PRINT, ME, calls, node_service, write_config, write_program

UNIT = "etc/systemd/system/macrame-node0.service"
PLIST = "Library/LaunchDaemons/org.macrame.node0.plist"


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = main([*map(str, words)])
    except SystemExit as ended:
        code = int(str(ended.code))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_files_below_another_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, root = write_config(tmp_path, nodes=[{"host": "127.0.0.1"}]), tmp_path / "disk"
    words = ("--config", config, "--user", ME, "--root", root)
    code, out, err = run(capsys, "install", *words, "--env", "HF_HUB_CACHE=/data/hub", "--", "--verbose")
    assert code == 0
    assert out.splitlines()[0] == f"Wrote {root / UNIT}"
    assert "Not started. On its machine:\n    sudo systemctl daemon-reload\n" in out
    assert "is in /tmp, which a restart empties" in err or not config.is_relative_to("/tmp")
    text = (root / UNIT).read_text()
    assert stat.S_IMODE((root / UNIT).stat().st_mode) == 0o644
    assert re.search(rf"^ExecStart=.* --rank 0 --config {config} --verbose$", text, re.MULTILINE)
    home = account_of(ME).home
    assert f"ReadWritePaths={home}/.cache /data/hub /data/macrame\n" in text
    assert (root / "data/hub").is_dir()

    code, out, _ = run(capsys, "status", "--root", root, "--json")
    (told,) = json.loads(out)["services"]
    assert (code, told["name"], told["rank"], told["config"], told["user"]) == (
        0,
        "node0",
        0,
        str(config),
        ME,
    )
    assert told["state"] == "not asked"
    code, out, _ = run(capsys, "remove", "--root", root)
    assert (code, out) == (0, f"Removed {root / UNIT}\n")
    assert not (root / UNIT).exists()
    _, out, _ = run(capsys, "status", "--root", root)
    assert out == "No node is installed as a service here; 'macrame service install --help' says how.\n"


def test_a_macs_files_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, root = write_config(tmp_path), tmp_path / "disk"
    words = ("--config", config, "--user", ME, "--system", "launchd", "--root", root)
    assert run(capsys, "install", *words)[0] == 0
    keys = plistlib.loads((root / PLIST).read_bytes())
    assert keys["UserName"] == ME
    output = root / "Library/Logs/macrame/node0.out.log"
    assert stat.S_IMODE(output.stat().st_mode) == 0o640
    output.write_text("said before\n")
    assert run(capsys, "install", *words)[0] == 0
    assert output.read_text() == "said before\n"


def test_print_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    code, out, _ = run(capsys, "install", "--config", config, "--user", ME, "--print")
    assert code == 0
    assert "# file, mode 644: /etc/systemd/system/macrame-node0.service\n" in out
    assert out.endswith("    sudo systemctl restart macrame-node0.service\n")
    code, out, _ = run(capsys, "install", "--config", config, "--user", ME, "--print", "--json")
    told = json.loads(out)
    assert told["files"][0]["path"] == f"/{UNIT}"
    assert told["commands"][0] == ["systemctl", "daemon-reload"]
    code, out, _ = run(capsys, "install", "wired-limit", "--mb", 12288, "--print", "--system", "launchd")
    assert "iogpu.wired_limit_mb=12288" in out
    assert sorted(tmp_path.iterdir()) == [config, tmp_path / "token"]


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of units of our own, and a systemctl that writes down what it is told."""
    folder = tmp_path / "systemd"
    folder.mkdir()
    show = "LoadState=loaded\\nActiveState=active\\nSubState=running\\nMainPID=312\\nNRestarts=0\\n"
    write_program(folder / "systemctl", f'case $1 in show) printf "{show}";; esac')
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(service_systemd, "FOLDER", folder)
    monkeypatch.setattr(service_systemd, "BOOTED", folder)
    monkeypatch.setattr(service, "_need_root", lambda *_: None)
    monkeypatch.setattr(service_node, "_FLEETING", ())
    return folder


def test_the_way_of_a_unit(tmp_path: Path, systemd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    cache = ("--env", f"XDG_CACHE_HOME={tmp_path / 'cache'}")
    code, out, _ = run(capsys, "install", "--config", config, "--user", ME, *cache)
    assert code == 0
    assert out.splitlines()[1:] == ["Started it.", "Its log: journalctl -u macrame-node0.service -f"]
    unit = "macrame-node0.service"
    assert calls(systemd) == ["daemon-reload", f"enable {unit}", f"restart {unit}"]
    code, out, _ = run(capsys, "status")
    assert code == 0
    assert re.search(rf"\bnode0 +running +0 +{ME} +312 +1 +{config}$", out, re.MULTILINE)
    # another cluster's node of the same rank is not put in its place
    (tmp_path / "other").mkdir()
    other = write_config(tmp_path / "other")
    code, _, err = run(capsys, "install", "--config", other, "--user", ME)
    assert (code, err) == (
        3,
        f"macrame service install: node0 is the service of {config} already: remove it, or give this one "
        "another --name\n",
    )
    words = ("install", "--config", other, "--user", ME, "--name", "second", "--no-start", *cache)
    assert run(capsys, *words)[0] == 0
    assert len(calls(systemd)) == 4  # status has asked once, and nothing was started
    code, _, err = run(capsys, "remove")
    assert (code, err) == (3, "macrame service remove: which service? installed are node0, second\n")
    code, _, err = run(capsys, "remove", "third")
    assert (code, err) == (
        3,
        "macrame service remove: there is no service 'third' here; installed are node0, second\n",
    )
    assert run(capsys, "remove", "second")[:2] == (0, f"Removed {systemd}/macrame-second.service\n")
    assert calls(systemd)[-3:] == [
        "disable --now macrame-second.service",
        "daemon-reload",
        "reset-failed macrame-second.service",
    ]


def test_one_that_does_not_run_is_exit_code_1(
    tmp_path: Path, systemd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (systemd / "macrame-node1.service").write_text(service_systemd.node_unit(node_service()))
    write_program(
        systemd / "systemctl", 'printf "LoadState=loaded\\nActiveState=failed\\nSubState=failed\\n"'
    )
    code, out, _ = run(capsys, "status", "node1", "--json")
    assert (code, json.loads(out)["services"][0]["state"]) == (1, "failed (failed)")


def test_a_command_that_fails_is_told(
    tmp_path: Path, systemd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(systemd / "systemctl", "echo Access denied >&2; exit 4")
    config = write_config(tmp_path)
    cache = ("--env", f"XDG_CACHE_HOME={tmp_path / 'cache'}")
    code, _, err = run(capsys, "install", "--config", config, "--user", ME, *cache)
    assert (code, err) == (
        1,
        "macrame service install: 'systemctl daemon-reload' ended with exit code 4: Access denied\n",
    )


def test_the_way_of_a_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bootstrap fails until the job before it is gone, as on a Mac; it is tried again."""
    folder = tmp_path / "launchd"
    folder.mkdir()
    (folder / "print.txt").write_text(LAUNCHCTL_PRINT)
    script = f"""case $1 in
print) cat "{folder}/print.txt";;
bootout) exit 113;;
bootstrap) [ $(grep -c bootstrap "{folder}/calls.txt") -ge 3 ] || exit 5;;
esac"""
    monkeypatch.setattr(service_launchd, "LAUNCHCTL", str(write_program(folder / "launchctl", script)))
    for place in ("FOLDER", "LOGS", "ROTATION"):
        monkeypatch.setattr(service_launchd, place, tmp_path / place)
    monkeypatch.setattr(service_apply, "RETRY_S", 0.01)
    monkeypatch.setattr(service, "_need_root", lambda *_: None)
    monkeypatch.setattr("sys.platform", "darwin")
    config = write_config(tmp_path)
    assert run(capsys, "install", "--config", config, "--user", ME, "--rank", 0)[0] == 0
    plist = tmp_path / "FOLDER/org.macrame.node0.plist"
    label = "system/org.macrame.node0"
    assert calls(folder) == [f"bootout {label}", f"enable {label}", *[f"bootstrap system {plist}"] * 3]
    code, out, _ = run(capsys, "status")
    assert code == 0
    assert re.search(rf"\bnode0 +running +0 +{ME} +312 +3 +1 +{config}$", out, re.MULTILINE)
    assert run(capsys, "remove")[0] == 0
    assert sorted(path.name for path in tmp_path.rglob("*node0*")) == ["node0", "node0.out.log"]  # logs
    code, _, err = run(capsys, "install", "wired-limit", "--mb", 10**9)
    if code == 3:  # on a Mac, whose memory sysctl tells
        assert "leaves the rest of this Mac too little" in err


def test_a_wired_limit_that_leaves_too_little(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("cluster.macos.output", lambda command: str(16 << 30))
    code, _, err = run(capsys, "install", "wired-limit", "--mb", 15000, "--print")
    assert (code, err) == (
        3,
        "macrame service install: --mb 15000 leaves the rest of this Mac too little: at most 14476\n",
    )
    assert run(capsys, "install", "wired-limit", "--mb", 14476, "--print")[0] == 0


def test_root_is_asked_for_with_the_line_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_systemd, "FOLDER", tmp_path)
    (tmp_path / "macrame-node1.service").write_text(service_systemd.node_unit(node_service()))
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    code, _, err = run(capsys, "remove", "node1")
    assert code == 1
    assert re.fullmatch(
        r"macrame service remove: services belong to the system, which only root may change: run "
        r"sudo /\S+( -m deploy\.cli)? service remove node1\n",
        err,
    )


REFUSED = [
    (("install",), "which cluster? give --config its file"),
    (("install", "wired-limit"), "wired-limit takes --mb, the GPU's limit in MiB"),
    (("install", "wired-limit", "--mb", "9"), "a wired limit is something of macOS; no other system has one"),
    (("install", "--config", "{config}", "--mb", "9"), "--mb is for 'macrame service install wired-limit'"),
    (
        ("install", "--config", "{config}", "--rank", "2"),
        "--rank 2 is not in {config}, which has ranks 0 to 1",
    ),
    (("install", "--config", "{config}", "--user", "no-such-user"), "there is no user 'no-such-user'"),
    (("install", "--config", "{config}", "--name", "A"), "the name 'A' must be lower-case letters"),
    (("install", "--config", "{config}", "--env", "A"), "--env A is not of the form KEY=VALUE"),
    (
        ("install", "--config", "{config}", "--env", "MACRAME_TOKEN=x"),
        "--env MACRAME_TOKEN would lie in a file that every user of this machine can read",
    ),
    (("install", "--config", "{config}", "--system", "launchd"), "--system launchd is not this machine's"),
    (("remove",), "no service of macrame is installed here"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_is_refused(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_systemd, "FOLDER", tmp_path)
    config = write_config(tmp_path)
    user = ("--user", ME) if "--config" in words and "--user" not in words else ()
    code, out, err = run(capsys, *[word.format(config=config) for word in words], *user)
    assert (code, out) == (3, "")
    assert message.format(config=config) in err


def test_which_node_this_machine_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = write_config(tmp_path, nodes=[{"host": "127.0.0.1"}, {"host": "127.0.0.1", "port": 50052}])
    code, _, err = run(capsys, "install", "--config", both, "--user", ME, "--print")
    assert code == 3
    assert err.endswith(f"{both} has several nodes with this machine's host: say which with --rank\n")


def test_a_shells_secrets_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MACRAME_TOKEN", "0123456789abcdef")
    config = write_config(tmp_path, nodes=[{"host": "0.0.0.0"}], security={})
    code, _, err = run(capsys, "install", "--config", config, "--rank", 0, "--user", ME, "--print")
    assert code == 3
    assert f"as {ME} and without your shell's environment, which a service does not have, the node " in err
    assert "which needs certificates or a cluster token" in err


def test_root_is_nobodys_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(
        Exception, match="a node needs no root: name the user that it is to run as with --user"
    ):
        account_of(None)
    monkeypatch.setenv("SUDO_USER", ME)
    if account_of(ME).uid != 0:
        assert account_of(None).name == ME


def test_another_systems_services(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "freebsd14")
    code, _, err = run(capsys, "status")
    assert code == 3
    assert "services are written for launchd and systemd, and this is freebsd14" in err


def test_a_machine_without_systemd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_systemd, "BOOTED", tmp_path / "none")
    monkeypatch.setattr(service_node, "_FLEETING", ())
    code, _, err = run(capsys, "install", "--config", write_config(tmp_path), "--user", ME)
    assert code == 1
    assert f"systemd does not run this machine (there is no {tmp_path}/none): --print shows" in err


def test_a_user_that_cannot_run_python(tmp_path: Path) -> None:
    node = node_service(account=account_of(ME), config=write_config(tmp_path), python=tmp_path / "python")
    with pytest.raises(
        Exception, match=f"{ME} cannot run {tmp_path}/python in .*: No such file or directory; "
    ):
        check_start(node)


def test_folders_that_a_service_does_not_see() -> None:
    home = node_service().account.home
    assert privacy_warning(node_service()) is None
    told = privacy_warning(node_service(config=home / "Documents/c.json"))
    assert told is not None
    assert told.startswith(
        f"{home}/Documents/c.json is in {home}/Documents, which macOS keeps from daemons: "
    )
    assert "/Volumes" in str(privacy_warning(node_service(config=Path("/Volumes/disk/c.json"))))
    assert fleeting_path(node_service()) is None
    assert fleeting_path(node_service(python=Path("/tmp/venv/bin/python"))) == (
        "/tmp/venv/bin/python is in /tmp, which a restart empties and which the service sees as its own, "
        "empty one: keep it elsewhere"
    )
