"""A wheel of the macrame that runs now, to carry to other machines: from a checkout or from an installed one.

Pure Python, no network, no build tools. The same files give the same bytes on every machine (stored, sorted,
without times), so that its digest names an environment. Format: "Binary distribution format" of
packaging.python.org. Any thread.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from cluster.errors import EXIT_ERROR, UserError
from shard_loader.whole_file import write_whole

NAME = "macrame"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can say
_MODE = 0o100644 << 16
_WHEEL = "Wheel-Version: 1.0\nGenerator: macrame\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_OF_INSTALLER = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL", "uv_cache.json"}


def own_wheel(folder: Path) -> Path:
    """Writes the wheel of this very code into `folder`; byte for byte the same for the same files.

    Raises UserError where the code is neither a checkout nor an installed distribution.
    """
    root = Path(__file__).resolve().parent.parent
    version, files = _of_checkout(root) if (root / "pyproject.toml").exists() else _of_installed(root)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAME}-{version}-py3-none-any.whl"
    write_whole(path, _packed(files, f"{NAME}-{version}.dist-info"))
    return path


def wheel_version(wheel: Path) -> str:
    """Version and digest of a wheel, such as 0.1.0+1f2e3d4c5b6a: other code is another version."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]
    return f"{wheel.name.split('-')[1]}+{digest}"


def _packed(files: Mapping[str, bytes], info: str) -> bytes:
    content = {**files, f"{info}/WHEEL": _WHEEL.encode()}
    record = "".join(
        f"{name},sha256={_record_hash(content[name])},{len(content[name])}\n" for name in sorted(content)
    )
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    # The metadata comes last, as the format recommends.
    order = sorted(content, key=lambda name: (name.startswith(info), name))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as wheel:
        for name in order:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, _MODE
            wheel.writestr(entry, content[name])
    return stream.getvalue()


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


# -- an installed distribution ------------------------------------------------------------------------------
def _of_installed(root: Path) -> tuple[str, dict[str, bytes]]:
    """Its version and files, as its RECORD lists them."""
    found = next(
        (d for d in distributions(name=NAME) if Path(str(d.locate_file(""))).resolve() == root), None
    )
    if found is None or found.files is None:
        raise UserError(
            f"the macrame in {root} was not installed by pip or uv, so no wheel of it can be made; install "
            "it from a wheel or a checkout",
            EXIT_ERROR,
        )
    return found.version, dict(_recorded(found))


def _recorded(found: Distribution) -> Iterator[tuple[str, bytes]]:
    for file in found.files or ():
        name = file.as_posix()
        is_compiled = "__pycache__" in file.parts or file.suffix == ".pyc"
        is_of_installer = file.parts[0].endswith(".dist-info") and file.parts[-1] in _OF_INSTALLER
        is_outside = name.startswith(("..", "/")) or file.parts[0].endswith(".data")
        if not (is_compiled or is_of_installer or is_outside):
            yield name, Path(str(file.locate())).read_bytes()


# -- a checkout ---------------------------------------------------------------------------------------------
def _of_checkout(root: Path) -> tuple[str, dict[str, bytes]]:
    """Its version and the files that its pyproject.toml puts into a wheel."""
    content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project, tools = content["project"], content["tool"]["setuptools"]
    patterns = tools["packages"]["find"]["include"]
    tops = sorted(
        path.parent.name
        for path in root.glob("*/__init__.py")
        if any(fnmatch(path.parent.name, pattern) for pattern in patterns)
    )
    chosen = {path for top in tops for path in (root / top).rglob("*.py")}
    for package, globs in tools["package-data"].items():
        for top in tops if package == "*" else [package.replace(".", "/")]:
            for pattern in globs:
                folder = root / top
                chosen |= set(folder.rglob(pattern) if package == "*" else folder.glob(pattern))
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in chosen
        if path.is_file() and "__pycache__" not in path.parts
    }
    info = f"{NAME}-{project['version']}.dist-info"
    files[f"{info}/METADATA"] = _metadata(project).encode()
    files[f"{info}/entry_points.txt"] = _entry_points(project["scripts"]).encode()
    files[f"{info}/top_level.txt"] = "".join(f"{top}\n" for top in tops).encode()
    for name in project["license-files"]:
        files[f"{info}/licenses/{name}"] = (root / name).read_bytes()
    return project["version"], files


def _metadata(project: Mapping[str, Any]) -> str:
    """Core metadata 2.4, without the long description: a changed README is no other macrame."""
    lines = [
        "Metadata-Version: 2.4",
        *(f"Name: {NAME}", f"Version: {project['version']}", f"Summary: {project['description']}"),
        *(f"License-Expression: {project['license']}", f"Requires-Python: {project['requires-python']}"),
        *(f"License-File: {name}" for name in project["license-files"]),
        *(f"Requires-Dist: {requirement}" for requirement in project["dependencies"]),
    ]
    for extra, requirements in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f"Requires-Dist: {_of_extra(requirement, extra)}" for requirement in requirements]
    return "\n".join(lines) + "\n"


def _of_extra(requirement: str, extra: str) -> str:
    what, marked, marker = requirement.partition(";")
    condition = f"({marker.strip()}) and " if marked else ""
    return f'{what.strip()}; {condition}extra == "{_normal(extra)}"'


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _entry_points(scripts: Mapping[str, str]) -> str:
    return "[console_scripts]\n" + "".join(f"{name} = {target}\n" for name, target in scripts.items())
