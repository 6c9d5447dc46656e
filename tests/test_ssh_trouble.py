"""What ssh says when it fails, as one sentence; the words are those of OpenSSH 9.2 and macOS."""

from __future__ import annotations

import pytest

from deploy.ssh_trouble import last_line, why_not_connected, why_not_written

CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Offending ED25519 key in /somewhere/known_hosts:3
Host key for [mini2.local]:2222 has changed and you have requested strict checking.
Host key verification failed.
"""
SAID = [
    (CHANGED, "(line 3 of /somewhere/known_hosts)", "ssh-keygen -R '[mini2.local]:2222'"),
    ("Host key verification failed.", "is not known here", "compare the fingerprint"),
    ("ssh: Could not resolve hostname mini2: Name or service not known", "name of ada@mini2", "spelling"),
    ("ssh: connect to host mini2 port 22: Connection refused", "no ssh server listens", "Remote Login"),
    ("ssh: connect to host mini2 port 22: Operation timed out", "does not answer", "Operation timed out"),
    ("ssh: connect to host mini2 port 22: No route to host", "does not answer", "No route to host"),
    ("Connection timed out during banner exchange", "does not answer", "awake"),
    ("ada@mini2: Permission denied (publickey).", "does not let us in", "ssh-copy-id ada@mini2"),
    ("Received disconnect: Too many authentication failures", "too many keys", "IdentitiesOnly"),
    ("kex_exchange_identification: Connection closed by remote host", "closed by remote", "ssh -v ada@mini2"),
    ("", "no ssh connection to ada@mini2:", "ssh -v"),
]


@pytest.mark.parametrize(("err", "what", "remedy"), SAID)
def test_each_failure_has_its_sentence(err: str, what: str, remedy: str) -> None:
    sentence = why_not_connected("ada@mini2", err)
    assert what in sentence
    assert remedy in sentence
    assert "ada@mini2" in sentence
    assert "\n" not in sentence


def test_a_full_disk_is_told_with_the_size_of_what_did_not_fit() -> None:
    told = why_not_written("mini2", "~/a", 12_345_678, "cat: write error: No space left on device")
    assert told == "the disk of mini2 is full: ~/a (12.3 MB) could not be written; make room there"


def test_other_failures_to_write_are_told_as_the_system_does() -> None:
    told = why_not_written("mini2", "/a/b", 1, "mkdir: cannot create directory '/a': Permission denied\n")
    assert (
        told == "/a/b could not be written on mini2: mkdir: cannot create directory '/a': Permission denied"
    )


def test_the_last_line_is_the_last_that_says_something() -> None:
    assert last_line("ssh: one\r\nssh: two\r\n\n@@@@@\n") == "two"
    assert last_line("") == ""
