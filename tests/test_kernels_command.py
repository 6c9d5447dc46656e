"""`macrame kernels`: what it tries, prints and refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from deploy import kernel_forms, kernels
from deploy.kernel_forms import (
    Form,
    MatrixForm,
    format_of,
    forms_of_model,
    known_forms,
    known_matrices,
)
from deploy.kernels_text import Result, results_text
from kernels import expert_blocks, moe, self_test
from kernels.emulator import build
from kernels.exl3_choice import Called
from kernels.expert_blocks import describe
from kernels.measure import Times
from kernels.moe_spec import ACTIVATIONS, GEGLU, PLAIN, REAL_SIZES, RELU2, Activation, BlockSpec, Format
from kernels.random_block import random_layer
from kernels.self_test import decide
from kernels.verdicts import Machine
from tests.big_shapes import write_shape
from tests.mlx_kernels import exl3_by_mlx, without_gpu
from tests.tiny_exl3 import write_exl3
from tests.tiny_models import write_checkpoint
from tests.zoo.checkpoint import write_zoo_checkpoint

MACHINE = Machine("Apple M4 Max", "Darwin 26.1", "0.32.4", "0123456789abcdef", "metal")
TINY = BlockSpec(4, 64, 32, 2, Format(4, 32), Format(4, 32), Format(4, 32), dtype=mx.float32)


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(build, "compiler", lambda: "c++")  # nothing is compiled here


def test_known_blocks() -> None:
    (form,) = known_forms("qwen3-30b-a3b", format_of("affine4", 64), "bfloat16")
    assert form.spec == BlockSpec(128, 2048, 768, 8, *[Format(4, 64)] * 3, dtype=mx.bfloat16)
    assert form.with_few_experts(16).spec.num_experts == 16
    alone, shared = known_forms("glm-4.7-flash", PLAIN, "float16")
    assert alone.with_few_experts(2).spec.num_experts == 4  # its top k
    assert replace(shared, shared=None) == alone
    assert shared.shared == BlockSpec(1, 2048, 1536, 1, PLAIN, PLAIN, PLAIN, dtype=mx.float16)
    assert (format_of("plain", 64), format_of("mxfp4", 64)) == (PLAIN, Format(4, 32, "mxfp4"))
    assert form.expert_bytes == 3 * 2048 * 768 // 2
    floats = [format_of(name, 64) for name in ("nvfp4", "mxfp8")]
    assert floats == [Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")]
    (nano,) = known_forms("nemotron-3-nano", floats[0], "bfloat16")
    assert nano.spec == BlockSpec(128, 2688, 1856, 6, None, floats[0], floats[0], RELU2)
    assert nano.expert_bytes == 2688 * 1856
    assert set(kernels.MODELS) == REAL_SIZES.keys()
    known = {*kernel_forms.LINEARS, *REAL_SIZES}
    assert {name.removesuffix("-exl3") for name in kernels.EXL3_BLOCKS} <= known
    assert set(kernels.FORMATS) == set(kernel_forms.FORMATS)


FORMS = ((3, 64), (8, 32), (4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8"))


@pytest.mark.parametrize("form", [*(Format(*sizes) for sizes in FORMS), PLAIN])
def test_random_layers_have_the_form_and_sensible_numbers(form: Format) -> None:
    dtype = mx.float32 if form == PLAIN else mx.bfloat16  # MLX's gather_mm on a CPU takes nothing else
    spec = BlockSpec(4, 128, 64, 2, form, form, form, activation=GEGLU, dtype=dtype)
    layer: Any = random_layer(spec, has_bias=True)
    assert expert_blocks.experts_of(layer)[1].bias is not None
    made = expert_blocks.tokens(spec, 3, 1)
    answer = expert_blocks.by_mlx(layer, made.x, made.indices, made.scores)
    assert (answer.shape, answer.dtype) == ((3, 128), dtype)
    assert 1e-3 < float(mx.abs(answer).max()) < 100
    assert describe(spec, layer).startswith("2 of 4 experts, 128 x 64, gate ")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_random_layers_of_each_activation(kind: str) -> None:
    activation = Activation(kind)
    gate = PLAIN if activation.has_gate else None
    spec = BlockSpec(4, 64, 32, 2, gate, PLAIN, PLAIN, activation=activation, dtype=mx.float32)
    layer: Any = random_layer(spec)
    made = expert_blocks.tokens(spec, 2, 1)
    mine = moe.run_by_mlx(
        moe.Block(spec, *expert_blocks.experts_of(layer)), made.x, made.indices, made.scores
    )
    theirs = expert_blocks.by_mlx(layer, made.x, made.indices, made.scores)
    assert mx.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_blocks_of_a_model(tmp_path: Path) -> None:
    quantize = {"bits": 4, "group_size": 32}
    folder = write_checkpoint("gpt_oss", tmp_path / "model", num_layers=2, quantize=quantize)
    (form,) = forms_of_model(str(folder))
    assert (form.name, form.has_bias) == ("model", True)
    assert form.spec.activation == Activation("swiglu_oai")
    assert (form.spec.num_experts, form.spec.top_k, form.spec.gate) == (4, 2, Format(4, 32))


SHARED = BlockSpec(1, 64, 96, 1, Format(4, 32), PLAIN, Format(8, 32), dtype=mx.float32)


@pytest.mark.parametrize("has_shared_bias", [False, True])
def test_a_block_with_a_shared_expert_is_tried_as_one(
    monkeypatch: pytest.MonkeyPatch, has_shared_bias: bool
) -> None:
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    form = Form("a", TINY, has_bias=True, shared=SHARED, has_shared_bias=has_shared_bias)
    made = form.subject(lambda _: 2)
    assert made.num_layers == 2
    bias = " with bias" if has_shared_bias else ""
    gate, down = (f"affine{bits}/32 (float32){bias}" for bits in (4, 8))
    own = f"; a shared expert of 96, gate {gate}, up float32{bias}, down {down}, swiglu"
    assert made.subject.name.endswith(own)
    trial = self_test.try_size(made.subject, 3, is_timed=False)
    assert (trial.failure, trial.error < 1e-4) == ("", True)
    one = made.subject.inputs(3, 1)
    for ours, mlx in zip(*(path.runs for path in made.subject.paths(3)), strict=True):
        assert mx.allclose(ours(one.x, one), mlx(one.x, one), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe_lite"])
def test_the_blocks_of_a_model_with_shared_experts(name: str, tmp_path: Path) -> None:
    alone, shared = forms_of_model(str(write_zoo_checkpoint(name, tmp_path / "model")))
    assert isinstance(shared, Form)
    assert shared.shared is not None
    assert (shared.shared.num_experts, shared.shared.hidden_size) == (1, shared.spec.hidden_size)
    assert replace(shared, shared=None) == alone


def test_the_blocks_of_a_model_without_gates(tmp_path: Path) -> None:
    (form,) = forms_of_model(str(write_zoo_checkpoint("phixtral", tmp_path / "model")))
    assert isinstance(form, Form)
    assert (form.has_bias, form.spec.gate, form.spec.activation) == (True, None, Activation("gelu"))


@pytest.mark.long
def test_the_blocks_of_a_model_of_which_only_headers_are_here(tmp_path: Path) -> None:
    found = forms_of_model(str(write_shape("GLM-4.7-Flash-4bit", tmp_path / "GLM-4.7-Flash-4bit")))
    known = known_forms("glm-4.7-flash", Format(4, 64), "bfloat16")
    assert found == [replace(form, name="GLM-4.7-Flash-4bit") for form in known]


def test_a_model_without_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_checkpoint("llama", tmp_path / "dense", num_layers=1)
    assert kernels.main(["--emulate", "--model", str(folder)]) == 1
    assert f"{folder} has no expert layers that kernels are for" in capsys.readouterr().err
    assert kernels.main(["--emulate", "--model", str(tmp_path / "none")]) == 3


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        without_gpu(
            "on", "MLX uses no GPU here: run macrame kernels --emulate to learn whether they are right"
        ),
        ("off", "MACRAME_KERNELS is off: run macrame kernels --emulate"),
        ("fast", "MACRAME_KERNELS is 'fast': say on, off or emulate"),
    ],
)
def test_without_a_gpu_it_says_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str, said: str
) -> None:
    monkeypatch.setenv("MACRAME_KERNELS", asked)
    assert kernels.main([]) == (3 if asked == "fast" else 1)
    assert said in capsys.readouterr().err


def test_the_emulator_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert kernels.main(["--emulate"]) == 1
    assert "the emulator needs a C++ compiler: install g++ or clang++" in capsys.readouterr().err


def test_the_emulator_needs_a_compiler_that_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "compiler", lambda: shutil.which("false"))
    assert kernels.main(["--emulate"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "false does not work, set CXX to another: it ended with code 1" in said


@pytest.mark.parametrize("tokens", ["0", "5000", "a", "1,", ""])
def test_sizes_are_numbers(tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kernels.main(["--tokens", tokens])
    assert ended.value.code == 3
    assert f"{tokens!r} must be numbers from 1 to 4096" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--model", "m", "--format", "mxfp4"],
            "--format is of a known block (--block): the model of --model",
        ),
        (["--model", "m", "--group-size", "64"], "--group-size is of a known block (--block)"),
        (["--model", "m", "--dtype", "bfloat16"], "has its own, leave --dtype out"),
        (["--block", "glm-4.7-flash", "--format", "mxfp4", "--group-size", "32"], "mxfp4 has none to choose"),
    ],
)
def test_an_option_that_would_be_passed_over_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert kernels.main(["--emulate", *options]) == 3
    assert said in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], kernel: Any) -> int:
    """The command on a tiny block, with `kernel` in the place of the kernels."""
    monkeypatch.setattr(moe, "run", kernel)
    monkeypatch.setattr(kernel_forms, "known_forms", lambda name, *_: [Form(name, TINY)])
    return kernels.main(["--emulate", "--block", "glm-4.7-flash", *arguments])


def test_json_without_times(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, ["--json"], moe.run_by_mlx) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["is_timed"], found["machine"]["backend"]) == (False, "emulated")
    (block,) = found["blocks"]
    assert (block["name"], [trial["tokens"] for trial in block["trials"]]) == ("glm-4.7-flash", [1, 2, 8])
    assert {(trial["failure"], trial["kernels_us"], trial["gb_s"]) for trial in block["trials"]} == {
        ("", None, None)
    }
    assert [(one["first"], one["last"]) for one in block["verdicts"]] == [(1, 1)]


def test_a_wrong_kernel_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, ["--tokens", "2"], lambda *args: moe.run_by_mlx(*args) + 1) == 1
    out = capsys.readouterr().out
    assert "2 tokens: wrong by " in out
    assert "nothing was timed; 4 experts of random weights" in out


def test_the_table() -> None:
    trials = [
        self_test.Trial(1, 1.5e-3, 2, Times(60.0, 114.0, 50.0, 90.0, 21e6)),
        self_test.Trial(2, 1.7e-3, 3, Times(100.0, 120.0, 90.0, 100.0, 40e6)),
        self_test.Trial(4, 1.7e-3, 3, Times(160.0, 150.0, 150.0, 140.0, 75e6)),
    ]
    verdicts = [decide(1, 1, trials[:1]), decide(2, 4, trials[1:])]
    form = Form("glm-4.7-flash", TINY)
    text = results_text(MACHINE, [Result(form, "the block", 301 * 10**6, 2, trials, verdicts)])
    assert text.splitlines() == [
        "Apple M4 Max, Darwin 26.1, MLX 0.32.4: metal kernels 0123456789abcdef",
        "",
        "glm-4.7-flash: the block",
        "tokens  answer    error  launches   kernels       MLX  ratio  GB/s",
        "------  ------  -------  --------  --------  --------  -----  ----",
        "     1   right  1.5e-03         2   60.0 us  114.0 us   1.90   420",
        "     2   right  1.7e-03         3  100.0 us  120.0 us   1.20   444",
        "     4   right  1.7e-03         3  160.0 us  150.0 us   0.94   500",
        "a node would use them for 1 tokens; 2 layers of random weights, 301 MB each",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--block", "glm-4.7-flash", "--bits", "4"),
            "--bits is of a known EXL3 block: add --block qwen3-8b-",
        ),
        (("--bits", "4"), "--bits is of a known EXL3 block"),
        (("--model", "a", "--bits", "4"), "--bits is of a known block (--block): the model of --model has"),
        (("--block", "qwen3-8b-exl3", "--format", "mxfp4"), "are of a block of experts: EXL3 has --bits"),
        (("--block", "qwen3-8b-exl3", "--group-size", "32"), "are of a block of experts: EXL3 has --bits"),
    ],
)
def test_options_of_other_blocks_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], said: str
) -> None:
    assert kernels.main(["--emulate", *arguments]) == 3
    assert said in capsys.readouterr().err


def test_known_exl3_matrices() -> None:
    dense = known_matrices("qwen3-8b-exl3", 4, "float16")
    assert [(one.input_dims, one.output_dims) for one in dense] == list(kernel_forms.LINEARS["qwen3-8b"])
    assert {one.kinds for one in dense} == {((4, "mcg"),)}
    assert {one.called for one in dense} == {Called(mx.float16)}
    up, down = known_matrices("qwen3-30b-a3b-exl3", 3, "bfloat16")
    assert (up.input_dims, up.output_dims, down.input_dims, down.output_dims) == (2048, 768, 768, 2048)
    assert (up.called, down.called) == (
        Called(mx.bfloat16, 8),
        Called(mx.bfloat16, 8, has_own_rows=True),
    )
    assert (up.num_experts, up.with_few_experts(16).num_experts, dense[0].num_experts) == (128, 16, 0)
    assert up.expert_bytes == 2048 * 768 * 3 // 8


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_the_matrices_of_an_exl3_model(tmp_path: Path, arch: str) -> None:
    folder, _ = write_exl3(arch, tmp_path / "models", num_layers=2)
    forms = forms_of_model(str(folder))
    assert {form.name for form in forms} == {"exl3"}
    assert all(isinstance(form, MatrixForm) for form in forms)
    experts = [form.called for form in forms if isinstance(form, MatrixForm) and form.has_experts]
    wanted = [Called(mx.float32, 2), Called(mx.float32, 2, has_own_rows=True)]
    assert experts == ([] if arch == "llama" else wanted)


@pytest.mark.long
def test_exl3_in_json_and_as_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = write_exl3("qwen3_moe", tmp_path / "models", num_layers=1)
    exl3_by_mlx(monkeypatch)
    assert kernels.main(["--emulate", "--model", str(folder), "--json"]) == 0
    blocks = json.loads(capsys.readouterr().out)["blocks"]
    assert "exl3 2 of 8 experts, 128 -> 64, 3 bits mcg, float32" in {one["block"] for one in blocks}
    for block in blocks:
        assert len(block["trials"]) == 4
        assert {trial["failure"] for trial in block["trials"]} == {""}
    assert kernels.main(["--emulate", "--model", str(folder), "--tokens", "1,33"]) == 0
    out = capsys.readouterr().out
    assert "exl3: exl3 128 -> 128, 3 bits mcg, float32" in out
    assert "nothing was timed; 8 experts of random weights" in out
    assert "nothing was timed; random weights, " in out
