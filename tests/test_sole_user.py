"""Who else uses a GPU: told by locks, which end with their processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shard_loader.sole_user import MAX_USERS, SoleUser

OTHER = """
import sys
from pathlib import Path
from shard_loader.sole_user import SoleUser
user = SoleUser(sys.argv[1], Path(sys.argv[2]))
print(user.is_alone(), flush=True)
sys.stdin.read()
"""


def test_two_users_know_of_each_other(tmp_path: Path) -> None:
    first = SoleUser("a", tmp_path)
    assert first.is_alone()
    second = SoleUser("a", tmp_path)
    assert not first.is_alone()
    assert not second.is_alone()
    other_gpu = SoleUser("b", tmp_path)
    assert other_gpu.is_alone()
    second.close()
    assert first.is_alone()
    assert not second.is_alone()
    first.close()
    other_gpu.close()


def test_a_killed_process_uses_it_no_more(tmp_path: Path) -> None:
    mine = SoleUser("a", tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, "a", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "False\n"
        assert not mine.is_alone()
        other.kill()
        other.wait()
    assert mine.is_alone()
    mine.close()


def test_where_nothing_can_be_locked_nobody_is_alone(tmp_path: Path) -> None:
    user = SoleUser("a", tmp_path / "nowhere")
    assert not user.is_alone()
    user.close()


def test_whoever_comes_while_others_look_is_seen(tmp_path: Path) -> None:
    users = [SoleUser("a", tmp_path)]
    for _ in range(MAX_USERS - 1):
        looking = users[-1]
        assert looking.is_alone() == (len(users) == 1)
        users.append(SoleUser("a", tmp_path))
        assert not any(user.is_alone() for user in users)
    one_more = SoleUser("a", tmp_path)
    assert not one_more.is_alone()
    for user in users[1:]:
        user.close()
    assert users[0].is_alone()
    users[0].close()
    one_more.close()


def test_files_of_others_can_be_locked(tmp_path: Path) -> None:
    first = SoleUser("a", tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    second = SoleUser("a", tmp_path)
    assert not first.is_alone()
    second.close()
    assert first.is_alone()
    first.close()
