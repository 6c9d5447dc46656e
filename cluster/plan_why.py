"""The account that `plan-dry-run` gives of a plan or of a refusal, as lines or for the key `why` of JSON.

Computed after the plan, for this command alone. One thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.plan_asker import AskedPlan
from planner.adapters import with_adapters
from planner.headers import read_config
from planner.missing import known_headers
from planner.model_profile import read_model_profile
from planner.plan import Plan
from planner.remedies import Remedy
from planner.variants import Checkpoint
from planner.why import Why, explain_plan, explain_refusal


@dataclass(frozen=True, slots=True)
class Account:
    """Of a plan, of a refusal, or of a plan that is forced although it does not fit."""

    why: Why | None
    remedies: tuple[Remedy, ...]

    def lines(self, *, is_full: bool) -> list[str]:
        """A blank line, and what to print below the plan."""
        lines = [] if self.why is None else ["", *self.why.lines(is_full=is_full)]
        if self.remedies:
            lines += ["", "what would make it fit, each by itself:"]
            lines += [f"  {line}" for remedy in self.remedies for line in remedy.lines_of_text()]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The value of `why`."""
        found = {} if self.why is None else self.why.as_dict()
        return found | {"remedies": [remedy.as_dict() for remedy in self.remedies]}


def account_of(asked: AskedPlan, config: ClusterConfig, model_dir: Path, *, is_quick: bool) -> Account:
    """Why it is so. Cuts that are known not to be exact are not reckoned with.

    is_quick: no more than the short form tells.
    """
    result, why = asked.proven.result, None
    if isinstance(result, Plan):
        why = explain_plan(result, asked.model, asked.nodes, asked.links, asked.same_cuts, is_quick=is_quick)
        if result.refusal is None:
            return Account(why, ())
    checkpoint = _checkpoint(config, model_dir)
    return Account(why, tuple(explain_refusal(asked.model, asked.nodes, asked.same_cuts, checkpoint)))


def _checkpoint(config: ClusterConfig, model_dir: Path) -> Checkpoint:
    """The checkpoint's files, to tell what other precisions of it take; they were read before."""
    plain = read_model_profile(model_dir, config.model, config.load.options)
    return Checkpoint(
        config=read_config(model_dir),
        headers=known_headers(model_dir),
        model=with_adapters(plain, config.adapters),
        kv=config.load.kv,
        finish=lambda model: with_adapters(model, config.adapters),
    )
