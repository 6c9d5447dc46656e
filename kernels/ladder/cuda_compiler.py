"""Compiles CUDA sources with no GPU: by NVRTC, which MLX uses, else by nvcc."""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURE = "sm_90"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a source. Sizes are ptxas', where nvcc is here: of a thread, and of a threadgroup."""

    error: str = ""  # empty where it compiles
    num_registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None


def include_folder() -> Path | None:
    """Where cuda_fp16.h lies: the toolkit that CUDA_HOME names, else nvcc's, else that of Python packages."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc is not None:
        homes.append(str(Path(nvcc).resolve().parent.parent))
    homes += sorted(glob.glob("/usr/local/cuda-*"), reverse=True)
    homes += [str(path) for folder in sys.path for path in Path(folder).glob("nvidia/cu*")]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_fp16.h").exists():
            return Path(home) / "include"
    return None


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """The library, of a Python package (mlx[cuda13] brings it) or of the system; None where there is none."""
    places = [str(path) for folder in sys.path for path in Path(folder).glob("nvidia/*/lib/libnvrtc.so.1?")]
    for name in (*places, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def tool() -> str | None:
    """The compiler that `compiled` uses here; None where there is none."""
    if include_folder() is None:
        return None
    if nvrtc() is not None:
        return "NVRTC"
    return "nvcc" if shutil.which("nvcc") else None


def compiled(source: str) -> Compiled:
    """The source for an H100 or H200. Of another chip it says as much: there is no assembler in it."""
    return _by_nvrtc(source) if tool() == "NVRTC" else _by_nvcc(source)


def _by_nvrtc(source: str) -> Compiled:
    library = nvrtc()
    assert library is not None
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    folder = include_folder()
    options = [
        f"--gpu-architecture={ARCHITECTURE}",
        f"--include-path={folder}",
        f"--include-path={folder}/cccl",
    ]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    try:
        if library.nvrtcCompileProgram(program, len(options), given):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            return Compiled(error=log.value.decode() or "NVRTC says nothing")
        return Compiled()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _by_nvcc(source: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source, encoding="utf-8")
        command = [
            "nvcc",
            "-std=c++17",
            "-diag-suppress=177",
            f"-arch={ARCHITECTURE}",
            "-cubin",
            "-Xptxas",
            "-v",
        ]
        command += [str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Compiled(error=done.stderr.strip() or "nvcc says nothing")
    return Compiled(
        num_registers=_number(r"Used (\d+) registers", done.stderr),
        spilled_bytes=_number(r"(\d+) bytes spill stores", done.stderr),
        shared_bytes=_number(r"(\d+) bytes smem", done.stderr) or 0,
    )


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None
