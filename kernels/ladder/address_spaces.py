"""Metal's address spaces, checked by clang as C++ for OpenCL: where a pointer points to is part of its type.

OpenCL knows no templates of kernels, so that template parameters become typedefs and constants; the body and
the headers stay as they are.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADER = Path(__file__).resolve().parent / "address_spaces.h"
_VERSIONS = range(21, 13, -1)
_FLAGS = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only"),
    *("-Xclang", "-finclude-default-header", "-cl-ext=-__opencl_c_generic_address_space", "-w"),
)
_FUNCTION = re.compile(
    r"(?:template <(?P<template>[^>]*)>\n)?\[\[kernel\]\] void (?P<name>\w+)\(\n(?P<parameters>.*?)\) \{\n"
    r"(?P<body>.*?)\n\}\n(?:\ntemplate \[\[host_name.*?decltype\(\w+<(?P<values>.*?)>\).*)?$",
    flags=re.S,
)


@functools.cache
def compiler() -> str | None:
    """A clang that knows C++ for OpenCL; None where there is none."""
    for name in ("clang", *(f"clang-{version}" for version in _VERSIONS)):
        found = shutil.which(name)
        if found and _compiles(found, "__kernel void probe(__global float* x) { x[0] = 1.0f; }") == "":
            return found
    return None


def check(source: str) -> str:
    """What clang finds wrong with a generated Metal source; empty where nothing is."""
    path = compiler()
    assert path is not None
    return _compiles(path, opencl(source))


def opencl(source: str) -> str:
    """The source as a C++ for OpenCL kernel, with lines numbered as in the source."""
    found = _FUNCTION.search(source)
    if found is None:
        raise ValueError("this is no generated Metal source")
    head = ""
    if found["template"]:
        names = (parameter.split() for parameter in found["template"].split(", "))
        for (kind, name), value in zip(names, found["values"].split(", "), strict=True):
            head += (
                f"typedef {value} {name};\n"
                if kind == "typename"
                else f"constexpr {kind} {name} = {value};\n"
            )
    parameters = re.sub(r"\s*\[\[[^\]]*\]\]", "", found["parameters"])
    line = source[: found.start("body")].count("\n") + 1
    before = source[: found.start()]
    return (
        f'#include "{HEADER}"\n#line 1 "generated.metal"\n{before}{head}'
        f"__kernel void {found['name']}({parameters}) {{\n"
        f'#line {line} "generated.metal"\n{found["body"]}\n}}\n'
    )


def _compiles(path: str, text: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".clcpp") as file:
        file.write(text)
        file.flush()
        done = subprocess.run([path, *_FLAGS, file.name], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{path} failed"
