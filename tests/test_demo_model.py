"""The bundled demo model: its layout, its figures, and that plain mlx-lm loads it and completes Python."""

from __future__ import annotations

import ast
import json
import math
import re
import struct
import sysconfig
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate, load
from tokenizers import Tokenizer

from deploy.demo.corpus import END_OF_TEXT_ID, is_held_out

MODEL = Path(__file__).parent.parent / "deploy" / "demo" / "model"
CONFIG = json.loads((MODEL / "config.json").read_text())
README = (MODEL / "README.md").read_text()


def read_shapes() -> dict[str, tuple[str, list[int], str]]:
    """Tensor name -> (dtype, shape, file), from the safetensors headers."""
    shapes: dict[str, tuple[str, list[int], str]] = {}
    for file in sorted(MODEL.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        header.pop("__metadata__", None)
        shapes |= {name: (entry["dtype"], entry["shape"], file.name) for name, entry in header.items()}
    return shapes


def readme_perplexity(name: str) -> float:
    found = re.search(rf"^\| {re.escape(name)} \| ([0-9.]+) \|", README, re.MULTILINE)
    assert found, f"the model's README has no perplexity of {name}"
    return float(found[1])


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer, *_ = load(str(MODEL))
    return model, tokenizer


def test_it_is_small_and_in_shards_with_an_index() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12_000_000
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (_, _, file) in read_shapes().items()}
    assert len(set(index["weight_map"].values())) >= 2


def test_config_has_the_promised_form() -> None:
    assert CONFIG["model_type"] == "qwen3_moe"
    assert CONFIG["num_hidden_layers"] >= 7
    assert CONFIG["num_hidden_layers"] % 2 == 1
    assert CONFIG["num_experts"] >= 8
    assert CONFIG["num_experts_per_tok"] >= 2
    assert 2048 <= CONFIG["vocab_size"] <= 8192
    assert CONFIG["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_quantised_linears_are_multiples_of_128_with_float32_scales() -> None:
    shapes = read_shapes()
    quantised = [name.removesuffix(".scales") for name in shapes if name.endswith(".scales")]
    assert len(quantised) == 1 + 7 * CONFIG["num_hidden_layers"]  # the embedding; q, k, v, o, gate, up, down
    for name in quantised:
        dtype, shape, _ = shapes[name + ".weight"]
        assert dtype == "U32"
        assert shape[-2] % 128 == 0, name
        assert shape[-1] * 4 % 128 == 0, name  # four 8-bit values in a word
        for part in (".scales", ".biases"):
            assert shapes[name + part][0] == "F32"
    others = {name for name in shapes if not name.startswith(tuple(quantised))}
    assert all(name.endswith(("norm.weight", "mlp.gate.weight")) for name in others)


def test_readme_perplexities_beat_the_trigram() -> None:
    eight_bit, float32, trigram = (
        readme_perplexity(n) for n in ("8-bit (this folder)", "float32", "trigram")
    )
    assert eight_bit < trigram / 2
    assert eight_bit < 1.01 * float32


def test_perplexity_on_a_held_out_file(loaded: tuple[Any, Any]) -> None:
    """The README's figure is believable: a file of this Python that was not trained on is near it."""
    model, tokenizer = loaded
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("*.py"))
    text = "".join((root / name).read_text(encoding="utf-8") for name in names if is_held_out(name))
    tokens = mx.array(tokenizer.encode(text)[:385])[None]
    logits = model(tokens[:, :-1])
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
    assert logits.dtype == mx.float32
    assert math.exp(-float(np.mean(np.array(chosen)))) < readme_perplexity("trigram") / 2


@pytest.mark.parametrize("prompt", ["def fibonacci(n):", "def is_prime(n):", "def read_lines(path):"])
def test_greedy_completion_is_python(loaded: tuple[Any, Any], prompt: str) -> None:
    """Plain mlx-lm: the answer is an indented body that parses, and ends by itself."""
    model, tokenizer = loaded
    answer = generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=96)
    assert len(tokenizer.encode(answer)) < 96, answer
    first, *body = answer.splitlines()
    assert first == ""
    assert body[0].startswith("    ")
    (function,) = ast.parse(prompt + answer).body
    assert isinstance(function, ast.FunctionDef)
    assert any(isinstance(node, ast.Return) for node in ast.walk(function)), answer


def test_tokenizer_keeps_any_text_and_cuts_at_newlines(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = "def f(n):\n    if n < 2:\n\treturn 'é∂🦊'  # x\r\n\n\n\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text).ids
    assert [tokenizer.decode([i]) for i in ids].count("\n") == text.count("\n")
    assert tokenizer.eos_token_ids == {END_OF_TEXT_ID}
    assert len(tokenizer.vocab) == CONFIG["vocab_size"]


def test_chat_template_joins_contents_as_lines(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    messages = [
        {"role": "system", "content": "Number theory.\nNo imports."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "def fibonacci"}, {"type": "text", "text": "(n):"}],
        },
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "# Number theory.\n# No imports.\ndef fibonacci(n):"
