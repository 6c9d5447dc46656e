"""The LaunchDaemons: every key is one of launchd.plist(5), with its type, and survives a round trip."""

from __future__ import annotations

import plistlib
from pathlib import Path
from typing import Any

import pytest

from deploy.service_launchd import (
    PATTERN,
    node_installation,
    node_plist,
    plist_path,
    read_installed,
    read_state,
    wired_limit_installation,
)
from deploy.units import WIRED_LIMIT, Found, NodeService
from tests.services import LAUNCHCTL_PRINT, node_service

# launchd.plist(5) of macOS 14: the keys that we use, and what they take
LIMITS = {"Core", "CPU", "Data", "FileSize", "MemoryLock", "NumberOfFiles", "NumberOfProcesses", "Stack"}
DOCUMENTED: dict[str, type | tuple[type, ...]] = {
    "Label": str,
    "UserName": str,
    "ProgramArguments": list,
    "EnvironmentVariables": dict,
    "WorkingDirectory": str,
    "RunAtLoad": bool,
    "KeepAlive": (bool, dict),
    "ThrottleInterval": int,
    "ExitTimeOut": int,
    "ProcessType": str,
    "SoftResourceLimits": dict,
    "HardResourceLimits": dict,
    "Umask": (int, str),
    "StandardOutPath": str,
    "StandardErrorPath": str,
    "LaunchOnlyOnce": bool,
}


def check(keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        assert isinstance(value, DOCUMENTED[key]), key
        if key in ("ThrottleInterval", "ExitTimeOut"):
            assert type(value) is int, key
    assert all(isinstance(word, str) for word in keys["ProgramArguments"])
    assert keys["ProgramArguments"][0].startswith("/")
    for key in ("SoftResourceLimits", "HardResourceLimits"):
        limits = keys.get(key, {})
        assert set(limits) <= LIMITS
        assert all(type(value) is int for value in limits.values())
    assert keys.get("ProcessType", "Standard") in {"Background", "Standard", "Adaptive", "Interactive"}


def test_the_nodes_plist_has_documented_keys_and_survives_a_round_trip() -> None:
    service = node_service(environment={"HF_HOME": "/data/<hf> & more"}, arguments=("--verbose",))
    keys = node_plist(service)
    check(keys)
    (plist,) = (file for file in node_installation(service).files if file.path.suffix == ".plist")
    assert plistlib.loads(plist.content.encode()) == keys
    assert plist.path == Path("/Library/LaunchDaemons/org.macrame.node1.plist")
    assert plist.path.match(PATTERN)
    assert (plist.mode, plist.account) == (0o644, None)  # launchd takes none that others may write
    assert keys["UserName"] == "alice"
    assert keys["ProgramArguments"][3:] == [
        *("--rank", "1", "--config", "/srv/alice/my 100% $cluster/c.json", "--verbose"),
        "--under-launchd",
        *("--log-file", "/Library/Logs/macrame/node1/node.log"),
    ]
    assert keys["EnvironmentVariables"]["HF_HOME"] == "/data/<hf> & more"
    assert keys["EnvironmentVariables"]["HOME"] == keys["WorkingDirectory"] == "/srv/alice"
    assert keys["RunAtLoad"] is True
    assert keys["KeepAlive"] == {"SuccessfulExit": False}  # what no restart mends ends with 0 under launchd


def test_the_output_belongs_to_the_user_in_a_folder_that_does_not() -> None:
    plan = node_installation(node_service())
    folder, own = plan.folders
    assert (str(own.path), own.account, own.mode) == (f"{folder.path}/node1", node_service().account, 0o700)
    (output, rotation, plist) = plan.files
    assert (str(folder.path), folder.account) == ("/Library/Logs/macrame", None)
    assert output.path.parent == folder.path
    assert (output.account, output.mode, output.is_kept) == (node_service().account, 0o640, True)
    assert plistlib.loads(plist.content.encode())["StandardErrorPath"] == str(output.path)
    (line,) = (line for line in rotation.content.splitlines() if not line.startswith("#"))
    # newsyslog.conf(5): logfilename owner:group mode count size when flags
    assert line.split() == [str(output.path), "alice:staff", "640", "3", "1024", "*", "BN"]
    assert str(rotation.path) == "/etc/newsyslog.d/org.macrame.node1.conf"


def test_a_log_file_of_the_users_own_stays() -> None:
    words = node_plist(node_service(arguments=("--log-file=/data/x.log",)))["ProgramArguments"]
    assert words[-2:] == ["--log-file=/data/x.log", "--under-launchd"]


def test_an_earlier_daemon_is_taken_out_before_the_new_one_comes() -> None:
    commands = node_installation(node_service()).start
    assert [command.words[1:] for command in commands] == [
        ("bootout", "system/org.macrame.node1"),
        ("enable", "system/org.macrame.node1"),
        ("bootstrap", "system", "/Library/LaunchDaemons/org.macrame.node1.plist"),
    ]
    assert [command.may_fail for command in commands] == [True, False, False]
    assert commands[2].retry_s > 0


def test_the_wired_limit_is_a_file_that_explains_itself() -> None:
    plan = wired_limit_installation(12288)
    (file,) = plan.files
    keys = plistlib.loads(file.content.encode())
    check(keys)
    assert keys["ProgramArguments"] == ["/usr/sbin/sysctl", "iogpu.wired_limit_mb=12288"]
    assert "KeepAlive" not in keys
    comment = file.content.partition("<!--")[2].partition("-->")[0]
    assert "--" not in comment  # which XML forbids
    assert "macOS forgets the\nvalue at every restart" in comment
    assert 'Removed by "sudo macrame service remove wired-limit"' in comment
    assert plan.notes == (comment.strip("\n"),)


def test_a_plist_says_what_it_is() -> None:
    service = node_service()
    path = plist_path("node1")
    content = plistlib.dumps(node_plist(service))
    assert read_installed(path, content) == Found("node1", path, 1, str(service.config), "alice")
    limit = wired_limit_installation(1).files[0]
    assert read_installed(limit.path, limit.content.encode()) == Found(WIRED_LIMIT, limit.path)
    for other in (b"", b"<plist>", plistlib.dumps([]), plistlib.dumps({"Label": "org.macrame.x"})):
        assert read_installed(path, other) is None


def test_what_launchctl_says() -> None:
    state = read_state("node1", 0, LAUNCHCTL_PRINT)
    assert (state.word, state.is_well, state.pid) == ("running", True, 312)
    assert (state.last_exit, state.num_starts) == (1, 3)
    waiting = LAUNCHCTL_PRINT.replace("\tstate = running", "\tstate = spawn scheduled")
    waiting = waiting.replace("\tpid = 312\n", "").replace("code = 1", "code = (never exited)")
    state = read_state("node1", 0, waiting)
    assert (state.word, state.is_well, state.pid, state.last_exit) == ("spawn scheduled", False, None, None)
    assert read_state("node1", 113, "").word == "not loaded"
    done = waiting.replace("(never exited)", "0")
    assert read_state(WIRED_LIMIT, 0, done).is_well
    refused = read_state("node1", 0, done.replace("spawn scheduled", "not running"))
    assert (refused.word, refused.is_well) == ("refused, see its log", False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Node 1"}, "the name 'Node 1' must be lower-case letters, digits and hyphens"),
        ({"name": "wired-limit"}, "the name 'wired-limit' must be"),
        ({"environment": {"A": "x\nUserName=root"}}, r"'x\nUserName=root' has a character"),
        ({"config": Path("/srv/a\0b")}, r"'/srv/a\x00b' has a character"),
    ],
)
def test_what_no_service_file_can_say(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        node_service(**values)
    assert message in str(refused.value)


def test_a_service_is_a_value() -> None:
    assert node_service() == node_service()
    assert isinstance(node_service(), NodeService)
