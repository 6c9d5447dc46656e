"""Headers at another precision against the headers of real conversions by MLX."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from planner.headers import TensorHeader, read_config, read_headers
from planner.model_profile import NO_OPTIONS, profile_model
from planner.precision import PRECISIONS, convert, num_params
from tests.tiny_models import write_checkpoint

ARCHITECTURES = ["llama", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2"]
Kinds = dict[str, tuple[str, tuple[int, ...], int]]


def kinds(headers: dict[str, TensorHeader]) -> Kinds:
    return {name: (h.dtype, h.shape, h.nbytes) for name, h in headers.items()}


def checkpoint(arch: str, folder: Path, bits: int) -> Path:
    quantize = {"bits": bits, "group_size": 64} if bits < 16 else None
    return write_checkpoint(
        arch,
        folder / f"{arch}{bits}",
        num_layers=3,
        dtype=mx.bfloat16,
        quantize=quantize,
        overrides={"intermediate_size": 192} if arch == "llama" else None,
    )


def converted_bytes(folder: Path, bits: int) -> int:
    """What mlx-lm's own conversion makes of a plain checkpoint."""
    model, config = load_model(folder, lazy=True)
    model, _ = quantize_model(model, config, 64, bits)
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("stored", [16, 4])
def test_other_precisions_weigh_what_mlx_lm_makes(arch: str, bits: int, stored: int, tmp_path: Path) -> None:
    folder = checkpoint(arch, tmp_path, stored)
    plain = folder if stored == 16 else checkpoint(arch, tmp_path, 16)
    config, headers, options = convert(read_config(folder), read_headers(folder), bits)
    predicted = profile_model(config, headers, "m", options).full_bytes
    assert predicted == pytest.approx(converted_bytes(plain, bits), rel=0.01)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_quantised_checkpoint_is_traced_back(arch: str, tmp_path: Path) -> None:
    plain, real = checkpoint(arch, tmp_path, 16), checkpoint(arch, tmp_path, 4)
    _, headers, _ = convert(read_config(real), read_headers(real), 16)
    assert kinds(headers) == kinds(read_headers(plain))
    assert num_params(read_config(real), read_headers(real)) == num_params({}, read_headers(plain))


def test_as_stored_is_as_stored(tmp_path: Path) -> None:
    real = checkpoint("llama", tmp_path, 4)
    config, headers = read_config(real), read_headers(real)
    assert convert(config, headers, PRECISIONS[0].bits) == (config, headers, NO_OPTIONS)


def test_formats_of_others_are_traced_back_too() -> None:
    def header(name: str, dtype: str, *shape: int) -> TensorHeader:
        return TensorHeader(name, dtype, shape, "f", 0, 0)

    found = [
        header("a.weight", "F8_E4M3", 128, 64),
        header("a.weight_scale_inv", "F32", 1, 1),
        header("b.gate_up_proj_blocks", "U8", 4, 128, 2, 16),
        header("b.gate_up_proj_scales", "U8", 4, 128, 2),
        header("n.weight", "F32", 64),
    ]
    _, whole, _ = convert({}, {h.name: h for h in found}, 16)
    assert kinds(whole) == {
        "a.weight": ("BF16", (128, 64), 2 * 128 * 64),
        "b.gate_up_proj_blocks": ("BF16", (4, 128, 64), 2 * 4 * 128 * 64),
        "n.weight": ("BF16", (64,), 128),
    }
