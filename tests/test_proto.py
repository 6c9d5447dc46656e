"""The committed generated code is what protoc makes of the schemas today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    schemas = sorted(f"proto/{path.name}" for path in (ROOT / "proto").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *schemas], cwd=ROOT, check=True
    )
    made = {path.name: path.read_text() for path in (tmp_path / "proto").iterdir()}
    kept = {
        path.name: path.read_text() for path in (ROOT / "proto").iterdir() if path.name.endswith(GENERATED)
    }
    assert made.keys() == kept.keys()
    for name, text in made.items():
        assert kept[name] == text, f"proto/{name} is stale; regenerate it as CONTRIBUTING.md says"


def test_importing_proto_imports_nothing() -> None:
    """`proto` is also the name of another package: ours must be recognisable and free of side effects."""
    script = "import sys; before = set(sys.modules); import proto; print(sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['proto']"
