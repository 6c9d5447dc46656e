"""What holds for the whole repository: imports, sizes, packaging, documents that name what exists."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("deploy", "cluster", "shard_loader", "planner", "kernels", "proto")
MAY_IMPORT = {
    "deploy": {"cluster", "shard_loader", "planner", "kernels", "proto"},
    "cluster": {"shard_loader", "planner", "kernels", "proto"},
    "shard_loader": {"planner", "kernels", "proto"},
    "planner": set(),
    "kernels": set(),
    "proto": set(),
}
FORBIDDEN = {
    "planner": {"mlx", "mlx_lm", "grpc"},
    "proto": {"mlx", "mlx_lm"},
    "kernels": {"grpc"},
    "shard_loader": {"grpc"},
}
MAX_LINES = 400
IS_GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
TEXT_SUFFIXES = {".py", ".pyi", ".md", ".json", ".toml", ".yaml", ".yml", ".proto", ".sh", ".txt", ".cfg", ""}
MACHINE_PATH = re.compile(r"(?<![\w.~$/<-])/(?:home|Users|root)/[\w.]|[A-Z]:\\Users")


def files() -> list[Path]:
    """The files of the repository, without what git ignores; without git, all but hidden and built ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        skipped = re.compile(
            r"(^|/)(\.(?!ci/|github/|gitignore)[^/]*|build|dist|__pycache__|[^/]*\.egg-info)(/|$)"
        )
        found = [p for p in ROOT.rglob("*") if not skipped.search(p.relative_to(ROOT).as_posix())]
    return sorted(path for path in found if path.is_file())


def python_files(*packages: str) -> Iterator[Path]:
    for path in files():
        parts = path.relative_to(ROOT).parts
        if path.suffix == ".py" and parts[0] in packages and not IS_GENERATED.search(path.name):
            yield path


def imported_tops(path: Path) -> set[str]:
    """The first components of every module a file imports, wherever the import stands."""
    tops = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            tops.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            tops.add(node.module.split(".")[0])
    return tops


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in python_files(package):
        tops = imported_tops(path)
        assert not (tops & {*PACKAGES, "tests"}) - allowed, f"{names(path)} imports upwards"
        assert not tops & FORBIDDEN.get(package, set()), f"{names(path)} imports what {package}/ must not"


def test_every_top_level_package_has_a_rule() -> None:
    found = {p.parent.name for p in files() if p.name == "__init__.py" and p.parent.parent == ROOT}
    assert found - {"tests"} == set(PACKAGES)


@pytest.mark.parametrize("package", ["proto", "kernels"])
def test_packages_whose_names_others_use_have_no_side_effects(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def test_the_planner_imports_without_mlx_and_grpc() -> None:
    modules = [names(path)[:-3].replace("/", ".") for path in python_files("planner")]
    code = f"import sys, {', '.join(modules)}; print(*sorted({{'mlx', 'mlx_lm', 'grpc'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_no_file_has_more_than_400_lines() -> None:
    too_long = {}
    for path in files():
        if path.suffix in {".py", ".pyi", ".proto", ".sh"} and not IS_GENERATED.search(path.name):
            num_lines = len(path.read_text(encoding="utf-8").splitlines())
            if num_lines > MAX_LINES:
                too_long[names(path)] = num_lines
    assert not too_long


def test_simple_queues_are_not_waited_for_with_a_timeout() -> None:
    """Before Python 3.13 `SimpleQueue.get` can wait for ever where its time ends as it begins to wait."""
    waits = re.compile(r"\.get\((timeout|block|True)")
    found = [
        path
        for path in python_files(*PACKAGES)
        if "SimpleQueue" in (text := path.read_text()) and waits.search(text)
    ]
    assert not found


def test_the_version_is_not_one_of_the_package_that_owns_our_names() -> None:
    version = pyproject()["project"]["version"]
    taken = re.fullmatch(r"0\.18\.(\d+)", version)
    assert taken is None or int(taken[1]) < 2, version


def test_mlx_is_required_on_macos_and_on_linux_with_a_cpu_backend() -> None:
    requirements = [Requirement(text) for text in pyproject()["project"]["dependencies"]]
    mlx = [r for r in requirements if r.name == "mlx"]
    for platform, extras in (("darwin", set()), ("linux", {"cpu"})):
        chosen = [r for r in mlx if r.marker is not None and r.marker.evaluate({"sys_platform": platform})]
        assert [r.extras for r in chosen] == [extras], platform


def test_every_dependency_has_a_lower_bound() -> None:
    project = pyproject()["project"]
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        assert any(s.operator in {">=", "=="} for s in Requirement(text).specifier), text


def test_every_command_of_the_package_exists() -> None:
    for command, target in pyproject()["project"]["scripts"].items():
        module, function = target.split(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert function in defined, command


@pytest.mark.parametrize("script", [".ci/run"])
def test_scripts_can_be_run(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


def test_no_paths_of_one_machine() -> None:
    found = []
    here = tuple(f"{folder}{os.sep}" for folder in (Path.home(), ROOT.parent) if folder != Path(ROOT.anchor))
    for path in files():
        if path.suffix not in TEXT_SUFFIXES or path.name == "tokenizer.json" or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line) or any(folder in line for folder in here):
                found.append(f"{names(path)}:{number}: {line.strip()[:100]}")
    assert not found


DOCUMENTS = [
    *(p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if p.exists()),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
FILE_SUFFIX = re.compile(r"\.(py|md|json|ya?ml|toml|proto|sh|txt|safetensors|plist|service)$")


def named_paths(text: str) -> Iterator[str]:
    """Links to the repository, and names in backticks that look like a path of it."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    for code in re.findall(r"`([^`\n]+)`", without_blocks):
        if re.fullmatch(r"[\w.-]+(/[\w.-]*)*(::\w+)?", code):
            name = code.split("::")[0]
            top = name.split("/")[0]
            if "/" in name and (top in {*PACKAGES, "tests", "docs", ".ci"} or FILE_SUFFIX.search(name)):
                yield name


def test_the_documents_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "LICENSE", "docs/token_path.md"):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_documents_name_existing_paths(document: Path) -> None:
    for name in named_paths(document.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (document.parent / name).exists(), name


def test_the_tree_of_the_readme_is_the_tree() -> None:
    """Every folder with a line in the README's tree exists, and every top-level folder has a line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^([\w.]+)/ {2,}\S", text, flags=re.M))
    assert shown == {names(p).split("/")[0] for p in files() if p.parent != ROOT}
