#!/bin/sh
# Makes .venv for a checkout and installs macrame into it: sh deploy/venv.sh [extra]
# Does nothing when that has been done for this folder, this pyproject.toml and this extra.
# PYTHON names the interpreter; without it, python3 or else the newest of python3.11 and up.
set -eu
extra="${1:-plain}"
cd "$(dirname "$0")/.."
venv=.venv

# The stamp is written last, so that an interrupted installation is never taken for a complete one.
# An installation with the dev extra serves the plain one too, and one with dev,long both.
wanted="$(pwd) $(cksum <pyproject.toml)"
if [ -x "$venv/bin/python" ]; then
    case "$extra" in
        dev,long) enough="dev,long" ;;
        dev) enough="dev dev,long" ;;
        *) enough="$extra dev dev,long" ;;
    esac
    for have in $enough; do
        stamp="$venv/.installed-$have"
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
    done
fi

fail() {
    echo "macrame: $*" >&2
    exit 1
}
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python="${PYTHON:-python3}"
if [ -z "${PYTHON:-}" ] && ! is_new_enough "$python"; then
    for candidate in python3.14 python3.13 python3.12 python3.11; do
        if is_new_enough "$candidate"; then python="$candidate" && break; fi
    done
fi
if ! command -v "$python" >/dev/null 2>&1; then
    fail "there is no $python here: install Python 3.11 or newer, or name one with PYTHON=/path/to/python."
fi
if ! is_new_enough "$python"; then
    version="$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || echo broken)"
    fail "Python 3.11 or newer is needed and $python is $version: install one, or name it with PYTHON=/path/to/python."
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    fail "$python lacks the venv module: install it (Debian and Ubuntu: sudo apt install python3-venv) and run this again."
fi

# What an interrupted installation left cannot be trusted: pip takes a half-copied package for a whole one.
rm -f "$venv"/.installed-*
if [ -f "$venv/.installing" ] || ! is_new_enough "$venv/bin/python" ||
    ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || fail "$python could not make a virtual environment in $venv; its own words stand above."
fi
: >"$venv/.installing"
what="." && [ "$extra" = plain ] || what=".[$extra]"
echo "Installing macrame and what it needs into $venv (once; a minute or two) ..." >&2
"$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --editable "$what" ||
    fail "the installation failed; pip's own words stand above. Run this again when that is solved."
printf '%s\n' "$wanted" >"$venv/.installed-$extra"
rm -f "$venv/.installing"
