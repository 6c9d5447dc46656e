"""Ssh against a real sshd: what it runs, writes and forwards, and each way in which a connection fails."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.errors import EXIT_ERROR, EXIT_UNREACHABLE, EXIT_USAGE, UserError
from deploy.ssh import Ssh
from tests.disks import small_disk
from tests.ring_processes import free_ports
from tests.ssh_host import SshHost, make_key, ssh_host
from tests.waiting import wait_for

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    with ssh_host(tmp_path_factory.mktemp("host")) as running:
        yield running


@pytest.fixture(autouse=True)
def usual(host: SshHost) -> Iterator[None]:
    """Each test finds the client's files as at first."""
    yield
    host.write_client_config()
    host.know()


@pytest.fixture
def ssh(host: SshHost) -> Iterator[Ssh]:
    with Ssh("box", options=host.options) as connected:
        yield connected


def refusal(host: SshHost, destination: str = "box") -> str:
    """The sentence with which a connection fails, for a machine that cannot be reached."""
    ssh = Ssh(destination, options=host.options)
    with pytest.raises(UserError) as raised:
        ssh.connect()
    assert raised.value.exit_code == EXIT_UNREACHABLE
    assert "\n" not in str(raised.value)
    assert ssh._master._folder is None
    return str(raised.value)


# -- what goes through it -----------------------------------------------------------------------------------
def test_a_script_gets_its_data_and_gives_output_errors_and_exit_code(host: SshHost, ssh: Ssh) -> None:
    script = "# ' \" \\ $HOME ! `quotes` \u00fc\npwd; printf '%s\\n' 'a\\b' >&2; cat; exit 7"
    reply = ssh.run(script, data=b"\x00\xffdata\n")
    assert reply.out == f"{host.home}\n\x00\ufffddata\n"
    assert (reply.code, reply.err) == (7, "a\\b\n")


def test_a_script_of_exit_code_255_is_not_a_lost_connection(ssh: Ssh) -> None:
    assert ssh.run("exit 255").code == 255


def test_scripts_find_what_homebrew_and_uv_install(host: SshHost, ssh: Ssh) -> None:
    tool = host.home / ".local/bin/own-tool"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    assert ssh.check("own-tool") == "found\n"
    assert "/opt/homebrew/bin:/usr/local/bin" in ssh.check("echo $PATH")


def test_a_failed_check_says_the_last_line_of_errors(ssh: Ssh) -> None:
    with pytest.raises(UserError, match=r"^box: second$"):
        ssh.check("echo first >&2; echo second >&2; false")
    with pytest.raises(UserError, match=r"^box: exit code 3$"):
        ssh.check("exit 3")


def test_a_script_that_does_not_end_is_given_up(ssh: Ssh) -> None:
    with pytest.raises(UserError, match=r"did not finish within 0.3 s: exec sleep 60") as raised:
        ssh.run("exec sleep 60", timeout_s=0.3)
    assert raised.value.exit_code == EXIT_UNREACHABLE
    assert ssh.check("echo on") == "on\n"


def test_no_process_list_shows_a_script(ssh: Ssh) -> None:
    shown = ssh.check("secret=s3cr3t-word; ps -A -o args= 2>/dev/null || ps ax")
    assert "s3cr3t" not in shown


@pytest.mark.parametrize("path", ["~/a folder/it's", "plain", "~/.deep/er/file"])
@pytest.mark.parametrize("content", [b"", os.urandom(3_000_000)], ids=["empty", "3 MB"])
def test_put_writes_the_file_as_it_is(host: SshHost, ssh: Ssh, path: str, content: bytes) -> None:
    ssh.put(content, path, mode=0o640)
    written = host.home / path.removeprefix("~/")
    assert written.read_bytes() == content
    assert written.stat().st_mode & 0o777 == 0o640
    assert list(written.parent.glob(".*.[0-9]*")) == []


def test_put_takes_absolute_paths_and_makes_private_folders(tmp_path: Path, ssh: Ssh) -> None:
    ssh.put(b"x", str(tmp_path / "new" / "secret"), mode=0o600)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new/secret").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path: Path, ssh: Ssh) -> None:
    with small_disk(tmp_path / "small"):
        ssh.put(b"old", str(tmp_path / "small/file"))
        with pytest.raises(UserError, match=r"^the disk of box is full: .*/small/file \(3.0 MB\)") as raised:
            ssh.put(bytes(3_000_000), str(tmp_path / "small/file"))
        assert raised.value.exit_code == EXIT_ERROR
        assert (tmp_path / "small/file").read_bytes() == b"old"
        assert os.listdir(tmp_path / "small") == ["file"]


def test_a_folder_that_is_none_is_told(host: SshHost, ssh: Ssh) -> None:
    (host.home / "file").write_text("")
    with pytest.raises(UserError, match=r"^~/file/below could not be written on box: mkdir: "):
        ssh.put(b"x", "~/file/below")


def test_a_long_running_script_is_read_as_it_goes_and_ends_with_us(host: SshHost, ssh: Ssh) -> None:
    log = host.home / "growing"
    log.write_text("one\n")
    process = ssh.popen("exec tail -n +1 -f growing")
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"one\n"
    with log.open("a") as file:
        file.write("two\n")
    assert process.stdout.readline() == b"two\n"
    process.terminate()
    process.wait(5.0)
    process.stdout.close()
    process.stdin.close()
    wait_for(lambda: not running_with("growing"), what="the end of tail there")


def test_a_long_running_script_that_ends_tells_its_exit_code(ssh: Ssh) -> None:
    assert output_of(ssh.popen("echo one; echo two; exit 3")) == (b"one\ntwo\n", 3)


def test_a_forwarded_port_leads_there_while_connected(host: SshHost) -> None:
    with Ssh("box", options=host.options) as ssh:
        port = ssh.forward("127.0.0.1", host.port)
        with socket.create_connection(("127.0.0.1", port), timeout=20.0) as connection:
            assert connection.recv(4) == b"SSH-"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=20.0)


def test_a_forward_that_stands_is_kept_and_made_again_at_its_port(host: SshHost) -> None:
    with Ssh("box", options=host.options) as ssh:
        port = ssh.forward("127.0.0.1", host.port)
        assert ssh.forward("127.0.0.1", host.port, local_port=port) == port  # asked for again by who waits
        ssh.close()
        ssh.connect()
        assert ssh.forward("127.0.0.1", host.port, local_port=port) == port
        with socket.create_connection(("127.0.0.1", port), timeout=20.0) as connection:
            assert connection.recv(4) == b"SSH-"
        ssh.close()
        with socket.create_server(("127.0.0.1", port)):  # somebody was faster
            ssh.connect()
            assert ssh.forward("127.0.0.1", host.port, local_port=port) != port


# -- shells, and what their start files do ------------------------------------------------------------------
@pytest.mark.parametrize("shell", ["dash", "bash", "zsh", "fish", "tcsh", "ksh"])
def test_a_command_line_of_ours_means_the_same_to_every_shell(shell: str, ssh: Ssh, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    line, head = ssh._master._wrapped("printf '%s|' \"$HOME\" 'a\\b'; cat")
    done = subprocess.run(
        [shell, "-c", line],
        input=head + b"data",
        capture_output=True,
        check=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.stdout.partition(b"\n")[2] == f"{tmp_path}|a\\b|data".encode()


def test_what_a_shell_s_start_file_prints_is_no_part_of_the_answer(tmp_path: Path) -> None:
    noisy = tmp_path / "rc"
    noisy.write_text("echo welcome to this machine; echo mind the step >&2; cd /\n")
    command = f'ForceCommand . {noisy}; eval "$SSH_ORIGINAL_COMMAND"'
    with ssh_host(tmp_path, command) as host, Ssh("box", options=host.options) as ssh:
        reply = ssh.run("pwd; echo err >&2")
        assert (reply.out, reply.err) == (f"{host.home}\n", "err\n")
        assert output_of(ssh.popen("echo one")) == (b"one\n", 0)


def test_an_account_without_a_shell_is_told(tmp_path: Path) -> None:
    with ssh_host(tmp_path, "ForceCommand echo This account is not available >&2; exit 1") as host:
        assert "lets us in but runs no command (This account is not available)" in refusal(host)


def test_a_host_without_sftp_and_scp_will_do(tmp_path: Path) -> None:
    with ssh_host(tmp_path, "Subsystem sftp /nowhere") as host, Ssh("box", options=host.options) as ssh:
        ssh.put(b"x", "~/file")
        assert (host.home / "file").read_bytes() == b"x"


# -- the user's own config ----------------------------------------------------------------------------------
def test_what_a_user_s_config_asks_for_terminals_does_not_disturb(host: SshHost) -> None:
    (port,) = free_ports(1)
    host.write_client_config(
        *("RequestTTY force", "RemoteCommand tmux attach", f"LocalForward {port} 127.0.0.1:1"),
        *("ControlMaster auto", "ControlPath /nowhere/at/all", "LogLevel QUIET", "ForwardAgent yes"),
    )
    with Ssh("box", options=host.options) as ssh:
        assert ssh.check("echo yes; [ -t 0 ] || echo no terminal") == "yes\nno terminal\n"


def test_a_config_that_ssh_does_not_take_is_told(host: SshHost) -> None:
    host.write_client_config("NoSuchOption yes")
    with pytest.raises(UserError, match=r"ssh does not take its settings for box: .*1 bad config") as raised:
        Ssh("box", options=host.options).connect()
    assert raised.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "destination", ["", "-oProxyCommand=touch /tmp/x", "a b", "a;b", "$(touch x)", "a\nb"]
)
def test_what_is_no_host_is_refused_before_ssh_sees_it(destination: str) -> None:
    with pytest.raises(UserError, match="is no host for ssh") as raised:
        Ssh(destination)
    assert raised.value.exit_code == EXIT_USAGE


# -- refusals -----------------------------------------------------------------------------------------------
def test_a_wrong_key_is_told(host: SshHost, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    host.write_client_config(f"IdentityFile {tmp_path / 'other'}")
    config = host.client_config.read_text().replace(str(host.folder / "user_key"), str(tmp_path / "other"))
    host.client_config.write_text(config)
    told = refusal(host)
    assert "box does not let us in (" in told
    assert "Permission denied (publickey)" in told
    assert "ssh-copy-id" in told


def test_an_unknown_host_key_is_refused_and_not_learnt(host: SshHost) -> None:
    host.known_hosts.unlink()
    assert "the host key of box is not known here" in refusal(host)
    assert not host.known_hosts.exists()


@pytest.mark.parametrize("wish", ["", "StrictHostKeyChecking no", "StrictHostKeyChecking accept-new"])
def test_a_changed_host_key_is_refused_whatever_the_config_says(
    host: SshHost, tmp_path: Path, wish: str
) -> None:
    kind, key, *_ = make_key(tmp_path / "other").with_suffix(".pub").read_text().split()
    host.known_hosts.write_text(f"# a line\n[127.0.0.1]:{host.port} {kind} {key}\n")
    host.write_client_config(*([wish] if wish else []))
    told = refusal(host)
    assert "the host key of box is not the one that is known here" in told
    assert f"(line 2 of {host.known_hosts})" in told
    assert f"ssh-keygen -R '[127.0.0.1]:{host.port}'" in told


def test_a_user_who_accepts_new_host_keys_is_believed(host: SshHost) -> None:
    host.known_hosts.unlink()
    host.write_client_config("StrictHostKeyChecking no")
    with Ssh("box", options=host.options) as ssh:
        assert ssh.check("echo in") == "in\n"
    assert f"[127.0.0.1]:{host.port}" in host.known_hosts.read_text()


def test_an_unknown_name_is_told(host: SshHost) -> None:
    assert "the name of nobody.invalid is not known here" in refusal(host, "nobody.invalid")


def test_a_host_without_a_server_is_told(host: SshHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = host.client_config.read_text().replace(f"Port {host.port}", f"Port {port}")
    host.client_config.write_text(config)
    assert "box answers, but no ssh server listens there" in refusal(host)


def test_a_host_that_is_silent_is_told_in_time(host: SshHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection and says nothing
        port = server.getsockname()[1]
        host.write_client_config("ConnectTimeout 1")
        config = host.client_config.read_text().replace(f"Port {host.port}", f"Port {port}")
        host.client_config.write_text(config)
        assert "box does not answer (" in refusal(host)


def test_without_an_ssh_client_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no ssh here: install the OpenSSH client"):
        Ssh("box").connect()


# -- losing it ----------------------------------------------------------------------------------------------
def test_a_lost_connection_is_told_and_made_again(host: SshHost, ssh: Ssh) -> None:
    begun = host.home / "begun"
    watching = threading.Thread(target=lambda: (wait_for(begun.exists), end_sessions(host)))
    watching.start()
    with pytest.raises(UserError, match="the connection to box was lost") as raised:
        ssh.run("touch ~/begun; exec sleep 60")
    watching.join()
    assert raised.value.exit_code == EXIT_UNREACHABLE
    assert ssh.check("echo again") == "again\n"


def test_a_connection_cut_in_the_middle_of_a_file_leaves_the_old_one(host: SshHost, ssh: Ssh) -> None:
    ssh.put(b"old", "~/cut")
    watching = threading.Thread(target=lambda: (wait_for(lambda: part_of(host)), end_sessions(host)))
    watching.start()
    with pytest.raises(UserError):
        ssh.put(bytes(400_000_000), "~/cut")
    watching.join()
    assert (host.home / "cut").read_bytes() == b"old"
    wait_for(lambda: not part_of(host), what="the part to be removed there")


def test_ctrl_c_does_not_take_the_connection_away(host: SshHost, ssh: Ssh) -> None:
    """Ctrl-C goes to our whole process group; nothing of the connection may be in it."""
    group = os.getpgid(0)
    ours = [p for p in psutil.process_iter(["cmdline"]) if "macrame-ssh" in " ".join(p.info["cmdline"] or [])]
    assert ours
    assert all(os.getpgid(p.pid) != group for p in ours)


def test_a_killed_process_of_ours_leaves_no_connection_behind_for_long(host: SshHost) -> None:
    code = f"""
import os, signal, deploy.ssh_master
deploy.ssh_master.LINGER_S = 1
from deploy.ssh import Ssh
ssh = Ssh("box", options={host.options!r})
ssh.connect()
print(ssh._master._folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Path(done.stdout.strip())
    wait_for(lambda: not (folder / "c").exists(), 10.0, "the end of the connection")
    shutil.rmtree(folder)


def test_a_process_of_ours_that_forgets_to_close_leaves_no_connection(host: SshHost) -> None:
    code = f"""
from deploy.ssh import Ssh
ssh = Ssh("box", options={host.options!r})
ssh.connect()
print(ssh._master._folder, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).exists()


def test_a_server_that_is_gone_is_told_after_it_was_there(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with ssh_host(tmp_path) as host:
            ssh = stack.enter_context(Ssh("box", options=host.options))
            end_sessions(host)
        wait_for(lambda: not ssh.is_connected)
        with pytest.raises(UserError, match="no ssh server listens") as raised:
            ssh.run("echo on")
        assert raised.value.exit_code == EXIT_UNREACHABLE


def output_of(process: subprocess.Popen[bytes]) -> tuple[bytes, int]:
    """What it wrote until it ended by itself: standard input stays open for so long."""
    with process:
        assert process.stdout is not None
        out = process.stdout.read()
        return out, process.wait(5.0)


def end_sessions(host: SshHost) -> None:
    """Ends the server's side of every connection at once, as a crash there does."""
    for child in psutil.Process(host.server.pid).children(recursive=True):
        if child.name().startswith("sshd"):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def part_of(host: SshHost) -> list[Path]:
    return list(host.home.glob(".cut.*"))


def running_with(word: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if word in (p.info["cmdline"] or [])]
