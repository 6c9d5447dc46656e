"""`macrame fit`: what it says fits does, and one more does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from deploy.fit import machines, main
from planner.fit import MAX_CONCURRENCY, Fit, fit
from planner.headers import read_config, read_headers
from planner.kv_quant import KvQuantization
from planner.model_profile import profile_model
from planner.node_profile import GB
from planner.plan import Plan
from planner.precision import PRECISIONS, convert
from planner.solver import PlanOptions, make_plan
from tests.fake_models import write_model

# About 1.1 GB in bf16: eight layers of 60 MB, and two tables of 320 MB. Heads of 64 elements.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 80000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (4096, 2048),
        "mlp.up_proj": (4096, 2048),
        "mlp.down_proj": (2048, 4096),
        "input_layernorm": (2048,),
        "post_attention_layernorm": (2048,),
    }
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"model.layers.{i}.{name}.weight": ("BF16", shape) for i in range(8) for name, shape in shapes.items()
    }
    tensors |= {f"{name}.weight": ("BF16", (80000, 2048)) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = ("BF16", (2048,))
    return write_model(tmp_path_factory.mktemp("fit") / "big", CONFIG, tensors)


def ask(model: Path, memory: str, *more: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "deploy.cli", "fit", "--model", str(model), "--memory", memory, "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("sizes", [[3 * GB], [GB, 2 * GB], [8 * GB, 2 * GB, GB]])
def test_the_limits_are_the_planners_own(model: Path, precision: Any, sizes: list[int]) -> None:
    config, headers, nodes = read_config(model), read_headers(model), machines(sizes)
    found = fit(config, headers, "big", nodes, precision, context=4096, concurrency=2)
    converted, whole, options = convert(config, headers, precision.bits)
    profile = profile_model(converted, whole, "big", options)

    def fits(context: int, concurrency: int) -> bool:
        return isinstance(make_plan(profile, nodes, (), PlanOptions(context, concurrency)), Plan)

    assert found.is_fitting == fits(4096, 2)
    assert found.weight_bytes == profile.full_bytes
    if found.max_context:
        assert fits(found.max_context, 2)
    if found.max_context < profile.max_context:
        assert not fits(found.max_context + 256, 2)
    if found.max_concurrency:
        assert fits(4096, found.max_concurrency)
    if found.max_concurrency < MAX_CONCURRENCY:
        assert not fits(4096, found.max_concurrency + 1)


def test_fewer_bits_weigh_less_and_hold_more(model: Path) -> None:
    config, headers, nodes = read_config(model), read_headers(model), machines([3 * GB])
    found: list[Fit] = [
        fit(config, headers, "big", nodes, p, context=4096, concurrency=1) for p in PRECISIONS[1:]
    ]
    weights = [f.weight_bytes for f in found]
    assert weights == sorted(weights, reverse=True)
    assert [round(f.bits_per_weight, 1) for f in found] == [16.0, 8.5, 6.5, 4.5, 3.5]
    contexts = [f.max_context for f in found]
    assert contexts == sorted(contexts)


def test_quantised_caches_hold_more_requests_and_need_more_scratch(model: Path) -> None:
    config, headers, nodes = read_config(model), read_headers(model), machines([8 * GB])
    plain, quantised = (
        fit(config, headers, "big", nodes, PRECISIONS[0], context=4096, concurrency=1, kv=kv)
        for kv in (None, KvQuantization(4))
    )
    assert quantised.max_concurrency > 2 * plain.max_concurrency
    assert isinstance(plain.outcome, Plan)
    assert isinstance(quantised.outcome, Plan)
    # The attention scores of a chunk are written to memory.
    before, after = (f.outcome.assignments[0].activation_bytes for f in (plain, quantised))
    assert after > before


def test_what_fits_is_exit_code_0_with_its_plan(model: Path) -> None:
    code, answer = ask(model, "1GB,2GB,2.5", "--context", "2048")
    assert code == 0
    assert answer["fits"]
    assert answer["refusal"] is None
    assert answer["memory_bytes"] == [GB, 2 * GB, 2_500_000_000]
    assert answer["budget_bytes"] == [567_000_000, 1_134_000_000, 1_417_500_000]
    assert answer["plan"]["context"] == 2048
    assert [p["precision"] for p in answer["precisions"]] == [p.name for p in PRECISIONS]
    assert [p["is_estimate"] for p in answer["precisions"]] == [False, *[True] * 5]


def test_what_does_not_fit_is_exit_code_2_with_what_does(model: Path) -> None:
    code, answer = ask(model, "1GB", "--context", "1024")
    assert code == 2
    assert answer["plan"] is None
    assert "the budget of node0 is 0.57 GB" in answer["refusal"]["reason"]
    assert [p["fits"] for p in answer["precisions"]] == [False, False, False, False, True, True]
    assert answer["precisions"][0]["max_context"] == answer["precisions"][0]["max_concurrency"] == 0


def test_the_tables(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(model), "--memory", "1GB,2GB", "--context", "2048"]) == 0
    text = capsys.readouterr().out
    assert "big on 1.00 GB + 2.00 GB: one request of 2048 tokens" in text
    for precision in PRECISIONS:
        assert sum(line.startswith(precision.name) for line in text.splitlines()) == 1
    assert "node1  2.00 GB" in text
    assert "a guess (0.667)" in text
    assert main(["--model", str(model), "--memory", "1GB", "--concurrency", "3", "--kv-bits", "8"]) == 2
    text = capsys.readouterr().out
    assert "big on 1.00 GB: 3 requests of 8192 tokens, keys and values in 8 bits" in text
    assert "As stored it does not fit: " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "16GB"], "the following arguments are required: --model"),
        (["--model", "m", "--memory", "lots"], "argument --memory: 'lots' must be a size such as 16GB"),
        (["--model", "m", "--memory", "16GB,"], "argument --memory: '' must be a size such as 16GB"),
        (["--model", "m", "--memory", "0"], "argument --memory: '0' must be a size such as 16GB"),
        (["--model", "m", "--memory", ",".join(["1"] * 65)], "65 machines are more than 64"),
        (["--model", "m", "--memory", "1", "--context", "0"], "argument --context: '0' must be a whole"),
        (["--model", "./nowhere", "--memory", "1"], "--model ./nowhere: "),
    ],
)
def test_what_cannot_be_asked_is_exit_code_3(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 3
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_caches_that_cannot_be_quantised_are_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG | {"head_dim": 80, "num_hidden_layers": 1}
    tensors = {
        "model.layers.0.self_attn.k_proj.weight": ("BF16", (640, 2048)),
        "model.embed_tokens.weight": ("BF16", (100, 2048)),
    }
    folder = write_model(tmp_path / "m", config, tensors)
    assert main(["--model", str(folder), "--memory", "1", "--kv-bits", "4"]) == 3
    assert "have 80 elements, which are no groups of 64" in capsys.readouterr().err


def test_only_cuts_that_are_exact_are_counted_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nanbeige runs its layers twice, so no machine may have a part of it."""
    config = {
        "model_type": "nanbeige",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 100,
        "num_loops": 2,
    }
    write_checkpoint_of(config, tmp_path / "m")
    assert main(["--model", str(tmp_path / "m"), "--memory", "2MB,2MB", "--context", "256"]) == 2
    shown = capsys.readouterr()
    assert "this model cannot be cut before layers 1, 2, 3; no plan here does" in shown.err
    assert "no legal cut" in shown.out or "are missing" in shown.out


def write_checkpoint_of(config: dict[str, Any], folder: Path) -> Path:
    """Headers only, of the parameters that mlx-lm's module has."""
    model_class, args_class = _get_classes(config=config)
    parameters = tree_flatten(model_class(args_class.from_dict(config)).parameters())
    return write_model(folder, config, {name: ("BF16", tuple(value.shape)) for name, value in parameters})
