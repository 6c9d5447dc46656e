"""macrame's folder on another machine, and its own Python environment there for exactly our wheel.

    ~/.macrame/env/DIGEST   an environment for each wheel, used again, the three newest kept
    ~/.macrame/wheels       macrame's wheel, and in links/ those that were carried along for its dependencies
    ~/.macrame/rings        files, logs and process records of the nodes (remote_node.py)

The scripts are POSIX sh with tools that macOS and Linux both have. One thread for each Ssh.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import EXIT_ERROR, UserError
from deploy.remote_trouble import why_not_installed, why_not_usable
from deploy.ssh import Ssh
from deploy.wheel import wheel_version

ROOT = "~/.macrame"
INSTALL_LIMIT_S = 3600.0  # all dependencies over a slow line
LOCK_LIMIT_S = 3600
PRUNE_LIMIT_S = 300.0
KEPT_ENVIRONMENTS = 3
CHECK = "import cluster.run_node, deploy.node_agent"  # what an environment must be able to do

# What is there: the root as a whole path, the system, whether the environment works, who could make one.
# /usr/bin/python3 of macOS is a stub that opens a window, or a 3.9.
_LOOK = r"""
umask 077
case $root in '~') root=$HOME ;; '~/'*) root=$HOME/${root#'~/'} ;; esac
mkdir -p "$root/env" "$root/wheels" "$root/rings" && chmod 700 "$root/rings" || exit 1
cd "$root" || exit 1
: >.writable.$$ || exit 1
rm -f .writable.$$
echo "root=$(pwd -P)"
echo "system=$(uname -s) $(uname -m)"
if [ -f "env/$name/complete" ] && "env/$name/bin/python" -c "$check" >&2; then
    echo "complete=1"
    touch "env/$name"
    exit 0
fi
if uv=$(command -v uv) && "$uv" --version >/dev/null 2>&1; then echo "uv=$uv"; fi
for python in python3.13 python3.12 python3.11 python3.14 python3; do
    path=$(command -v "$python") || continue
    if [ "$path" = /usr/bin/python3 ] && [ "$(uname -s)" = Darwin ]; then continue; fi
    told=$("$path" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
    echo "found=$told at $path"
    "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
    echo "python=$path"
    "$path" -c 'import venv, ensurepip' 2>/dev/null || continue
    echo "venv=$path"
    break
done
exit 0
"""

# Makes env/$name; `complete` is written last, so nothing half installed is ever used. One at a time: a lock
# whose holder is gone is taken over.
_INSTALL = r"""
umask 077
unset PYTHONPATH PYTHONHOME
cd "$root" || exit 1
waited=0
until mkdir "env/$name.lock" 2>/dev/null; do
    if [ ! -d "env/$name.lock" ]; then mkdir "env/$name.lock"; exit 1; fi
    holder=$(cat "env/$name.lock/pid" 2>/dev/null)
    if [ -n "$holder" ] || [ "$waited" -gt 5 ]; then
        kill -0 "${holder:-0}" 2>/dev/null && [ -n "$holder" ] || rm -rf "env/$name.lock"
    fi
    waited=$((waited + 1))
    if [ "$waited" -gt "$limit" ]; then echo "another installation there does not end" >&2; exit 1; fi
    sleep 1
done
trap 'rm -rf "env/$name.lock"' EXIT
trap 'exit 1' HUP INT TERM PIPE
echo $$ >"env/$name.lock/pid"
[ -f "env/$name/complete" ] && "env/$name/bin/python" -c "$check" && exit 0
rm -rf "env/$name"
make_it() {
    if [ -n "$uv" ]; then
        "$uv" venv --quiet --no-project --no-config --python "$wanted" "env/$name" || return 1
        "$uv" pip install --quiet --python "env/$name/bin/python" "$@" "$what"
    else
        "$python" -m venv "env/$name" || return 1
        "env/$name/bin/python" -m pip install --quiet --no-input --no-compile --disable-pip-version-check \
            --timeout 15 --retries 2 "$@" "$what"
    fi
}
if [ -n "$links" ]; then
    export UV_PYTHON_DOWNLOADS=never
    set -- --no-index --find-links "$links"
fi
if make_it "$@" && "env/$name/bin/python" -c "import mlx.core; $check" &&
    echo "$version" >"env/$name/complete"; then
    exit 0
fi
df -Pk "$root" | awk 'NR == 2 { print "free_kb=" $4 }'
rm -rf "env/$name"
exit 1
"""

# Removes all environments but the newest and those that a node's process uses.
_PRUNE = r"""
cd "$root/env" || exit 0
kept=0
for name in $(ls -t); do
    [ -f "$name/complete" ] || continue
    kept=$((kept + 1))
    [ "$kept" -gt "$keep" ] || continue
    ps -A -o args= | grep -F "$root/env/$name/bin/" | grep -qv grep && continue
    rm -rf "$name" && echo "$name"
done
exit 0
"""

# The digest of each file of a folder; sha256sum on Linux, shasum on macOS.
_DIGESTS = r"""
mkdir -p "$folder" && cd "$folder" || exit 1
[ -n "$(ls)" ] || exit 0
if command -v sha256sum >/dev/null; then sha256sum -- *; else shasum -a 256 -- *; fi
"""


@dataclass(frozen=True, slots=True)
class RemoteHome:
    """Where macrame is on a machine, by absolute paths there."""

    root: str
    python: str  # the interpreter of our wheel's environment
    version: str  # as wheel_version tells it
    system: str  # such as "Darwin arm64" or "Linux x86_64"


def prepare(
    ssh: Ssh,
    wheel: Path,
    *,
    show: Callable[[str], None],
    extra: str = "",
    find_links: Path | None = None,
    root: str = ROOT,
) -> RemoteHome:
    """Makes sure that `wheel` is installed there in its own environment; says through `show` what takes long.

    extra: an extra of ours, such as cuda13. find_links: a folder of wheels here, all that is needed there for
    macrame's dependencies: they are carried along, and nothing is fetched from an index. Raises UserError.
    """
    version = wheel_version(wheel)
    digest = version.partition("+")[2]
    name = f"{digest}-{extra}" if extra else digest
    there = _look(ssh, root, name)
    home = RemoteHome(there["root"], f"{there['root']}/env/{name}/bin/python", version, there["system"])
    if there.get("complete"):
        return home
    installer = _installer(ssh, there)
    carried = f"{home.root}/wheels/{digest}/{wheel.name}"
    show(f"copying macrame {version} ({wheel.stat().st_size / 1e6:.0f} MB)")
    ssh.put(wheel.read_bytes(), carried)
    links = "" if find_links is None else _carry(ssh, find_links, f"{home.root}/wheels/links", show)
    show(f"installing macrame and what it needs with {installer} (once; it may take minutes)")
    values = {
        "root": home.root,
        "name": name,
        "version": version,
        "what": f"{carried}[{extra}]" if extra else carried,
        "links": links,
        "uv": there.get("uv", ""),
        "python": there.get("venv", ""),
        "wanted": ">=3.11",
        "check": CHECK,
        "limit": str(LOCK_LIMIT_S),
    }
    reply = ssh.run(_with(values, _INSTALL), timeout_s=INSTALL_LIMIT_S)
    if reply.code != 0:
        free_kb = dict(_pairs(reply.out)).get("free_kb", "")
        raise UserError(
            why_not_installed(ssh.destination, home.system, reply.err, free_kb, find_links), EXIT_ERROR
        )
    ssh.run(_with({"root": home.root, "keep": str(KEPT_ENVIRONMENTS)}, _PRUNE), timeout_s=PRUNE_LIMIT_S)
    return home


def _look(ssh: Ssh, root: str, name: str) -> dict[str, str]:
    reply = ssh.run(_with({"root": root, "name": name, "check": CHECK}, _LOOK))
    if reply.code != 0:
        raise UserError(why_not_usable(ssh.destination, root, reply.err), EXIT_ERROR)
    return dict(_pairs(reply.out))


def _installer(ssh: Ssh, there: Mapping[str, str]) -> str:
    """Who will make the environment, in words. Raises UserError where nobody can."""
    if "uv" in there:
        return f"uv ({there['uv']})"
    if "venv" in there:
        return there["venv"]
    if "python" in there:
        raise UserError(
            f"{there['python']} on {ssh.destination} lacks the venv module: install it there (Debian and "
            "Ubuntu: sudo apt install python3-venv), or install uv",
            EXIT_ERROR,
        )
    found = f" (only {there['found']})" if "found" in there else ""
    raise UserError(
        f"{ssh.destination} has neither Python 3.11 or newer{found} nor uv: install one of them there, such "
        "as with 'brew install uv' or 'curl -LsSf https://astral.sh/uv/install.sh | sh'",
        EXIT_ERROR,
    )


def _carry(ssh: Ssh, folder: Path, there: str, show: Callable[[str], None]) -> str:
    """Copies the wheels of a folder that are not there yet; returns the folder there."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(f"{folder} holds no wheels (.whl) to carry along", EXIT_ERROR)
    out = ssh.check(_with({"folder": there}, _DIGESTS), timeout_s=INSTALL_LIMIT_S)
    known = {
        name.strip("* "): digest for digest, _, name in (line.partition(" ") for line in out.splitlines())
    }
    wanted = [w for w in wheels if known.get(w.name) != _digest(w)]
    if wanted:
        num_bytes = sum(w.stat().st_size for w in wanted)
        show(f"copying {len(wanted)} wheels ({num_bytes / 1e6:.0f} MB)")
    for wheel in wanted:
        ssh.put(wheel.read_bytes(), f"{there}/{wheel.name}")
    return there


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with(values: Mapping[str, str], script: str) -> str:
    return "".join(f"{key}={shlex.quote(value)}\n" for key, value in values.items()) + script


def _pairs(out: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (line.partition("=") for line in out.splitlines())]
