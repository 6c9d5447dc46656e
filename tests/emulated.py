"""Kernels in the emulator, for tests."""

from __future__ import annotations

import pytest

from kernels.emulator import build

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="no C++ compiler (g++ or clang++) is here"
)
