"""From the file of verdicts to a plan: the same forms on both sides, nothing stale, nothing unchecked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cluster import dry_run
from cluster.errors import EXIT_OK
from cluster.kernel_times import kept_times, read_times, times_of, told_times
from cluster.probe import seen_machine, this_machine
from kernels import expert_subject, measure, moe, switch
from kernels.exl3 import exl3_layers
from kernels.exl3_choice import learning
from kernels.exl3_subject import exl3_subjects
from kernels.expert_subject import expert_subjects
from kernels.measure import Subject
from kernels.self_test import judge
from kernels.verdicts import Form, Kept, Timed, Verdict, Verdicts
from kernels.verdicts import this_machine as machine_of
from planner.model_profile import read_model_profile
from proto import control_pb2
from shard_loader.cache_home import verdict_folder
from shard_loader.weights import load_shard
from tests.node_process import write_cluster
from tests.test_forms import times
from tests.tiny_exl3 import write_exl3
from tests.tiny_models import write_checkpoint
from tests.zoo.checkpoint import write_zoo_checkpoint

FORM = Form(128, 8, 2048, 768, ("affine4/64",) * 3)
TAKEN = Verdict(1, 1, True, ours_us=250.0, mlx_us=500.0, timed=(Timed(1, 250.0, 500.0),))
SLOWER = Verdict(2, 4, False, "0.90 times as fast", timed=(Timed(2, 700.0, 600.0), Timed(4, 900.0, 1000.0)))
UNTIMED = (Verdict(5, 8, True), Verdict(9, 16, False, "wrong by 1.0e-01"))
TIMES = times((1, 1, 0.25, 0.25), (2, 4, 0.6, 1.0))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Kernels are emulated, and MLX's operations stand in the place of the emulator."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MACRAME_KERNELS", "emulate")
    monkeypatch.setattr(moe, "run", moe.run_by_mlx)
    monkeypatch.setattr(expert_subject, "CLASSES", ((1, 1), (2, 4)))
    monkeypatch.setattr(measure, "MAX_CALLS", 2)
    monkeypatch.setattr(measure, "NUM_ROUNDS", 1)
    this_machine.cache_clear()
    yield
    this_machine.cache_clear()


def subjects_of(folder: Path, num_layers: int) -> list[Subject]:
    """Of all layers of a checkpoint, called once as a node does it."""
    shard = load_shard(folder, 0, num_layers)
    layers, matrices = switch.expert_layers(shard.own_modules), exl3_layers(shard.own_modules)
    taken = switch.take_over(layers, switch.Never())
    with learning(matrices):
        shard.dry_run()
    return [*expert_subjects(taken)[0], *exl3_subjects(matrices)]


def mixed(path: str) -> tuple[int, Any] | None:
    """Experts of 2 and 4 bits in one layer; all else has 3."""
    if path.endswith((".gate", "embed_tokens")):
        return None
    expert = re.search(r"experts\.(\d+)\.", path)
    return (2 + 2 * (int(expert[1]) % 2) if expert else 3), "mcg"


@pytest.mark.parametrize(
    "made",
    [
        {"quantize": {"bits": 4, "group_size": 32}},
        {"quantize": {"bits": 4, "group_size": 32}, "arch": "deepseek_v3"},
        {"quantize": {"bits": 8, "group_size": 32}, "arch": "gpt_oss"},
        {"unstack_experts": True},
        {"arch": "llama"},
    ],
)
def test_the_planner_and_the_kernels_name_the_same_forms(made: dict[str, Any], tmp_path: Path) -> None:
    arch = made.pop("arch", "qwen3_moe")
    folder = write_checkpoint(arch, tmp_path / "model", num_layers=3, **made)
    found = {one.form for one in subjects_of(folder, 3)}
    assert {Form(**asdict(form)) for form in read_model_profile(folder).forms} == found
    assert bool(found) == (arch != "llama")


@pytest.mark.parametrize("name", ["nemotron_h", "phixtral"])
def test_so_they_do_of_blocks_without_a_gate(name: str, tmp_path: Path) -> None:
    folder = write_zoo_checkpoint(name, tmp_path / name)
    found = {one.form for one in subjects_of(folder, 7)}
    assert found
    assert {Form(**asdict(form)) for form in read_model_profile(folder).forms} == found


@pytest.mark.parametrize(("arch", "kinds"), [("llama", None), ("qwen3_moe", None), ("qwen3_moe", mixed)])
def test_so_they_do_of_exl3(arch: str, kinds: Any, tmp_path: Path) -> None:
    folder, _ = write_exl3(arch, tmp_path, num_layers=3, **({} if kinds is None else {"kind_of": kinds}))
    subjects, model = subjects_of(folder, 3), read_model_profile(folder)
    assert {Form(**asdict(form)) for form in model.forms} == {s.form for s in subjects if s.form is not None}
    assert any(one.form is None for one in subjects) == (kinds is not None)
    counts: dict[Form, int] = {}
    for use in [use for layer in model.layers for use in layer.forms] + [model.head_form]:
        assert use is not None
        form = Form(**asdict(use.form))
        counts[form] = counts.get(form, 0) + use.count
    layers = {s.form: sum(len(other.layers) for other in subjects if other.form == s.form) for s in subjects}
    assert counts == {form: count for form, count in layers.items() if form is not None}


def test_what_is_used_counts() -> None:
    assert times_of([Kept(FORM, (TAKEN, SLOWER, *UNTIMED))]) == (TIMES,)
    assert times_of([Kept(None, (TAKEN,)), Kept(FORM, UNTIMED)]) == ()


@pytest.mark.parametrize("us", [-1.0, float("nan"), 1e12, "fast", None])
def test_a_file_with_times_that_cannot_be_is_not_believed(us: Any, caplog: pytest.LogCaptureFixture) -> None:
    wrong = replace(TAKEN, timed=(Timed(1, us, 5.0),))
    assert times_of([Kept(FORM, (wrong,)), Kept(FORM, (TAKEN,))]) == (times((1, 1, 0.25, 0.25)),)
    assert "times of kernels that were kept are not used" in caplog.text


@pytest.mark.parametrize(
    ("form", "taken"),
    [
        (replace(FORM, top_k=8.5), TAKEN),
        (replace(FORM, num_experts=True), TAKEN),
        (replace(FORM, formats=(1, 2, 3)), TAKEN),
        (replace(FORM, formats=("\ud800",) * 3), TAKEN),
        (FORM, replace(TAKEN, timed=(Timed(1.5, 250.0, 500.0),))),
    ],
)
def test_what_could_not_be_told_is_not_believed_either(
    form: Any, taken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = Kept(FORM, (TAKEN, SLOWER))
    assert told_times(times_of([Kept(form, (taken,)), good])) == told_times([TIMES])
    assert "times of kernels that were kept are not used" in caplog.text


def test_of_another_machine_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    here, node = machine_of("emulated"), seen_machine()
    for change in ({"mlx": "0.1"}, {"chip": "Apple M9"}, {"kernels": "0" * 16}, {"system": "Plan 9"}):
        Verdicts(verdict_folder(), replace(here, **change)).keep("block", [TAKEN], FORM)
        assert kept_times(node) == ()
    Verdicts(verdict_folder(), here).keep("block", [TAKEN, SLOWER], FORM)
    assert kept_times(node) == (TIMES,)
    assert kept_times(node, "cpu") == ()
    for asked in ("off", "on", "sideways"):
        monkeypatch.setenv("MACRAME_KERNELS", asked)
        assert kept_times(replace(node, device="cpu")) == ()


def test_both_ends_of_the_wire_agree() -> None:
    told = told_times([TIMES, TIMES])
    again = control_pb2.NodeProfile.FromString(control_pb2.NodeProfile(forms=told).SerializeToString())
    assert read_times(again.forms) == (TIMES, TIMES)


def wrong(**values: Any) -> list[control_pb2.FormTimes]:
    (one,) = told_times([TIMES])
    for key, value in values.items():
        setattr(one if hasattr(one, key) else one.spans[0], key, value)
    return [one]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (wrong(num_experts=0), "num_experts = 0 must be at least 1"),
        (wrong(first_ms=float("nan")), "first_ms = nan must be above 0"),
        (wrong(last_ms=float("inf")), "last_ms = inf must be above 0, and at most"),
        (wrong(last_rows=2), "rows = 1 to 2 and 2 to 4 must be in order, and apart"),
        (
            [control_pb2.FormTimes(num_experts=1, top_k=1, inputs=1, outputs=1)],
            "formats = () must be one, or two or three",
        ),
        (told_times([TIMES] * 300), "forms = 300 must be at most 256"),
        ([control_pb2.FormTimes(spans=[control_pb2.FormSpan()] * 17)], "spans = 17 must be at most 16"),
    ],
)
def test_what_a_node_tells_is_checked(told: list[control_pb2.FormTimes], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_times(told)


def test_a_real_trial_comes_through_to_the_plan_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Timed as on a GPU, kept as a node keeps it, read as plan-dry-run reads it."""
    folder = write_checkpoint("qwen3_moe", tmp_path / "model", num_layers=3)
    config = write_cluster(tmp_path, folder, {"name": "n0", "host": "127.0.0.1", "port": 5001})
    assert dry_run.main(["--config", str(config)]) == EXIT_OK
    assert "self-test" not in capsys.readouterr().out
    (subject,) = subjects_of(folder, 3)
    verdicts = [judge(subject, *ends, is_timed=True) for ends in subject.classes]
    assert [[size.num_tokens for size in one.timed] for one in verdicts] == [[1], [2, 4]]
    Verdicts(verdict_folder(), machine_of("emulated")).keep(subject.name, verdicts, subject.form)
    this_machine.cache_clear()
    (found,) = this_machine().forms
    one = verdicts[0].timed[0]
    assert found.ms(1) == (one.ours_us if verdicts[0].is_taken else one.mlx_us) / 1e3
    assert dry_run.main(["--config", str(config)]) == EXIT_OK
    note = "note: blocks of experts or EXL3 matrices count as the self-test of kernels timed them on n0"
    assert note in capsys.readouterr().out
