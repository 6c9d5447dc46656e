"""What a machine says of itself over ssh: recorded Macs and GPUs, and the script itself run here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.errors import UserError
from deploy.init_probe import SCRIPT, host_of, is_here, reachable_host, read_probe, this_machine
from tests.services import machine

MAC = """\
system=Darwin
name=mini2.local
connection=192.168.1.20 51234 192.168.1.21 22
release=15.5
memory_bytes=17179869184
chip=Apple M4
displays={   "SPDisplaysDataType" : [     {       "_name" : "Apple M4", "sppci_cores" : "10"     }   ] }
identity=      "IOPlatformUUID" = "5D0A4C2E-1111-2222-3333-444455556666"
python=
python=3.9
uv=/opt/homebrew/bin/uv
"""
NVIDIA = """\
system=Linux
name=box
connection=
memory_kib=131072000
limit_bytes=max
chip=AMD EPYC 9654 96-Core Processor
machine=x86_64
gpus=NVIDIA H200, 143771
identity=0123456789abcdef
python=3.12
uv=
"""


def test_a_mac() -> None:
    mac = read_probe("alice@mini2.local", "mini2.local", MAC)
    assert (mac.destination, mac.host, mac.name) == ("alice@mini2.local", "mini2.local", "mini2")
    assert (mac.system, mac.chip, mac.gpu_cores, mac.memory_bytes) == ("macOS 15.5", "Apple M4", 10, 1 << 34)
    assert mac.identity == "5D0A4C2E-1111-2222-3333-444455556666"
    assert mac.seen_us_as == "192.168.1.20"
    assert mac.can_install  # by uv; Python 3.9 is too old
    assert not read_probe("x", "x", MAC.replace("/opt/homebrew/bin/uv", "")).can_install


def test_a_gpu_counts_with_its_own_memory() -> None:
    gpu = read_probe("box", "10.0.0.7", NVIDIA)
    assert (gpu.chip, gpu.memory_bytes, gpu.gpu_cores) == ("NVIDIA H200", 143771 << 20, None)
    assert gpu.can_install
    plain = read_probe("box", "10.0.0.7", NVIDIA.replace("NVIDIA H200, 143771", ""))
    assert (plain.chip, plain.memory_bytes) == ("AMD EPYC 9654 96-Core Processor", 131072000 * 1024)
    limited = NVIDIA.replace("NVIDIA H200, 143771", "").replace("bytes=max", "bytes=4294967296")
    assert read_probe("box", "10.0.0.7", limited).memory_bytes == 1 << 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MAC.replace("Darwin", "FreeBSD"), "box runs FreeBSD: a node needs macOS or Linux"),
        ("", "box runs no system that it names: a node needs macOS or Linux"),
        (MAC.replace("17179869184", ""), "box does not say how much memory it has"),
    ],
)
def test_what_can_be_no_node(text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        read_probe("box", "box", text)
    assert str(refused.value) == message


@pytest.mark.skipif(sys.platform != "linux", reason="what it prints is compared with Linux's own figures")
def test_the_script_runs_in_sh() -> None:
    done = subprocess.run(["sh"], input=SCRIPT, capture_output=True, text=True, check=True)
    here = read_probe("box", "127.0.0.1", done.stdout)
    assert here.memory_bytes <= psutil.virtual_memory().total
    if not here.chip.startswith("NVIDIA"):
        assert here.chip == this_machine().chip
    assert here.can_install
    assert here.identity == Path("/etc/machine-id").read_text().strip()


def test_ssh_says_which_host_a_name_means(tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    config.write_text("Host box\n  HostName 10.1.2.3\n")
    assert host_of("box", ("-F", str(config))) == "10.1.2.3"
    assert host_of("alice@mini2.local", ("-F", str(config))) == "mini2.local"


def test_which_names_are_this_machine() -> None:
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("somebody@localhost")  # who asks for ssh gets it
    assert not is_here("mini2.example")


def test_how_others_find_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    assert reachable_host([machine(seen_us_as="fe80::1%en0"), machine(seen_us_as="10.0.0.5")]) == "10.0.0.5"
    assert reachable_host([machine(seen_us_as="127.0.0.1")]) == "127.0.0.1"
    assert reachable_host([machine()]) == "box"
    monkeypatch.setattr("socket.gethostname", lambda: "mini1.local")
    assert reachable_host([machine(seen_us_as="10.0.0.5")]) == "mini1.local"
