"""The kernels of a loaded shard's experts and EXL3 matrices: tested, and chosen. Compute thread only."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from kernels import backend, failure, switch, wanted
from kernels.exl3 import exl3_layers
from kernels.exl3_choice import OPERATIONS, learning
from kernels.self_test import Report, WantedElsewhereError, self_test, try_next
from kernels.source import FOLDER
from shard_loader.cache_home import verdict_folder
from shard_loader.shard import Shard
from shard_loader.trim import clear_cache

logger = logging.getLogger(__name__)

NO_GPU = "MLX uses no GPU here"


def choose_kernels(
    shard: Shard, on_step: Callable[[], None] = lambda: None, *, budget_s: float | None = None
) -> Report | None:
    """Test the kernels on the shard's own expert layers and EXL3 matrices, and use them where they are right
    and faster.

    None where it has none. Whatever fails, the shard computes as before, and the report says why. on_step is
    called after each piece of work; after budget_s (None: 20 s) nothing further is begun, and what is left
    is for `choose_more`.
    """
    layers, matrices = switch.expert_layers(shard.own_modules), exl3_layers(shard.own_modules)
    if not layers and not matrices:
        return None
    report = Report("", len(layers), num_matrices=len(matrices))
    try:
        if backend.current() is None:
            off = os.environ.get(wanted.VARIABLE) == "off"
            report.reasons.append(f"{wanted.VARIABLE} is off" if off else NO_GPU)
            return report
        taken = switch.take_over(shard.own_modules, switch.Never())
        with learning(matrices):
            shard.dry_run()  # the layers learn how the model calls them
        report = self_test(taken, verdict_folder(), matrices=matrices, budget_s=budget_s, on_step=on_step)
        if report.is_used:
            shard.warm_up()
        else:
            switch.release(taken)
    except Exception as error:  # border: kernels are an extra, without which the node serves as well
        switch.release(layers)
        for matrix in matrices:
            matrix.choice = OPERATIONS
        reason = failure.line(error)
        logger.warning("no kernels are used: %s", reason, exc_info=True)
        report = Report("", len(layers), reasons=[reason], num_matrices=len(matrices))
    clear_cache()
    return report


def choose_more(report: Report, on_step: Callable[[], None], is_wanted: Callable[[], bool]) -> None:
    """Test one class that the start had no time for; what is_wanted elsewhere, it leaves for later."""

    def step() -> None:
        on_step()
        if is_wanted():
            raise WantedElsewhereError

    try:
        try_next(report, step)
    except WantedElsewhereError:
        return
    except Exception as error:  # border, as above: what is left waits for the next start
        logger.warning("no more kernels are tested: %s", failure.line(error), exc_info=True)
        report.untested.clear()
    clear_cache()


def distrust_kernels(shard: Shard, failure: Exception) -> None:
    """After a step failed: where the device says that it was a kernel, the next steps do without."""
    text = str(failure)
    names = (path.stem for path in FOLDER.glob("*.metal"))
    if isinstance(failure, RuntimeError) and any(name in text for name in names):
        switch.give_up(switch.expert_layers(shard.own_modules), failure)
        for matrix in exl3_layers(shard.own_modules):
            matrix.give_up(failure)
