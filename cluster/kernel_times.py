"""What a machine's self-tests of kernels timed, as the planner takes it: from the file, and on the wire.

Both come from outside, so both are checked, by the values themselves. Any thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from kernels.wanted import wanted
from planner.forms import Form, FormSpan, FormTimes
from planner.node_profile import NodeProfile
from proto import control_pb2
from shard_loader.cache_home import verdict_folder

if TYPE_CHECKING:
    from kernels.verdicts import Kept, Verdict

logger = logging.getLogger(__name__)

MAX_FORMS = 256
MAX_SPANS = 16


def kept_times(node: NodeProfile, device: str | None = None) -> tuple[FormTimes, ...]:
    """Of this machine as it is now: of another MLX, chip, system or text of the kernels nothing is kept.

    Nothing either where no kernel would run. device: as the cluster file has it. Imports MLX where there may
    be something.
    """
    try:
        is_emulated = wanted() == "emulate"
    except ValueError:  # whoever computes says so
        return ()
    if device == "cpu" or (node.device == "cpu" and not is_emulated):
        return ()
    from kernels import backend
    from kernels.verdicts import Verdicts, this_machine

    where = backend.current()
    if where is None:
        return ()
    return times_of(Verdicts(verdict_folder(), this_machine(where)).every())


def times_of(kept: Iterable[Kept]) -> tuple[FormTimes, ...]:
    """Of what is used: the kernels where they were taken, MLX's operations where they were slower.

    What was not timed, as all that is untested, wrong or emulated, has no time here.
    """
    found: list[FormTimes] = []
    for one in kept:
        if one.form is None or not any(verdict.timed for verdict in one.verdicts):
            continue
        try:
            spans = (_span(verdict) for verdict in one.verdicts if verdict.timed)
            made = FormTimes(Form(**asdict(one.form)), tuple(spans))
            found += read_times(told_times([made]))  # what the wire does not carry is in no file either
        except (ValueError, TypeError) as error:
            logger.warning("times of kernels that were kept are not used: %s", error)
    return tuple(found[:MAX_FORMS])


def _span(verdict: Verdict) -> FormSpan:
    ends = verdict.timed[0], verdict.timed[-1]
    first_ms, last_ms = ((one.ours_us if verdict.is_taken else one.mlx_us) / 1e3 for one in ends)
    return FormSpan(ends[0].num_tokens, ends[1].num_tokens, first_ms, last_ms)


def told_times(times: Sequence[FormTimes]) -> list[control_pb2.FormTimes]:
    """For a node's profile."""
    return [
        control_pb2.FormTimes(
            **asdict(one.form), spans=[control_pb2.FormSpan(**asdict(span)) for span in one.spans]
        )
        for one in times
    ]


def read_times(told: Sequence[control_pb2.FormTimes]) -> tuple[FormTimes, ...]:
    """Raises ValueError naming what is wrong."""
    if len(told) > MAX_FORMS:
        raise ValueError(f"forms = {len(told)} must be at most {MAX_FORMS}")
    return tuple(_read(one) for one in told)


def _read(told: control_pb2.FormTimes) -> FormTimes:
    if len(told.spans) > MAX_SPANS:
        raise ValueError(f"spans = {len(told.spans)} must be at most {MAX_SPANS}")
    form = Form(told.num_experts, told.top_k, told.inputs, told.outputs, tuple(told.formats))
    spans = (FormSpan(s.first_rows, s.last_rows, s.first_ms, s.last_ms) for s in told.spans)
    return FormTimes(form, tuple(spans))
