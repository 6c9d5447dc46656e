"""The best plan of legal cuts. Proofs are what the test says; those of test_proof.py are real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.proof import Prover
from cluster.proven_plan import ProvenPlan, make_proven_plan
from planner.model_profile import ModelProfile, read_model_profile
from planner.node_profile import GB, NodeProfile, make_node
from planner.plan import Plan, Refusal
from planner.render import render_plan
from planner.solver import PlanOptions
from shard_loader.cut_proof import CutProof
from tests.fake_models import llama_config, llama_tensors, write_model

MB = 10**6
NUM_LAYERS = 6


class Known(Prover):
    """Proofs by cut; every set of legal cuts is exact together, but for `apart`."""

    def __init__(self, reasons: dict[int, str], apart: Sequence[int] = ()) -> None:
        self.reasons, self.apart, self.asked = reasons, list(apart), []
        self.is_over = False

    @property
    def is_stopped(self) -> bool:
        return self.is_over

    def known(self, cuts: Sequence[int] | None) -> list[CutProof] | None:
        return None

    def prove(self, cuts: Sequence[int] | None) -> list[CutProof]:
        self.asked.append(None if cuts is None else list(cuts))
        if cuts is not None and list(cuts) == self.apart:
            return [CutProof(cut, False, 0.5, "not together") for cut in cuts]
        every = range(1, NUM_LAYERS) if cuts is None else cuts
        return [CutProof(cut, cut not in self.reasons, None, self.reasons.get(cut, "")) for cut in every]


@pytest.fixture
def model(tmp_path: Path) -> ModelProfile:
    folder = write_model(tmp_path / "m", llama_config(NUM_LAYERS), llama_tensors(NUM_LAYERS))
    return read_model_profile(folder)


def nodes(*budgets_bytes: int) -> list[NodeProfile]:
    return [
        make_node(i, f"n{i}", f"h{i}", memory_bytes=16 * GB, chip="Apple M4", cap_bytes=b, reserve_bytes=0)
        for i, b in enumerate(budgets_bytes)
    ]


def proven(
    model: ModelProfile, prover: Prover, *, is_together: bool = True, strategy: str = "uniform"
) -> ProvenPlan:
    options = PlanOptions(context=64, strategy=strategy)
    return make_proven_plan(model, nodes(GB, GB), [], options, prover, is_together=is_together)


def test_the_best_plan_is_taken_where_its_cuts_are_exact(model: ModelProfile) -> None:
    prover = Known({1: "no", 5: "no"})
    plan = proven(model, prover)
    assert isinstance(plan.result, Plan)
    assert (plan.result.cuts, plan.notes, prover.asked) == ((3,), (), [[3]])
    dry = Known({1: "no", 5: "no"})
    assert proven(model, dry, is_together=False).result == plan.result
    assert dry.asked == [None]


def test_a_plan_on_one_node_needs_no_proof(model: ModelProfile) -> None:
    prover = Known(dict.fromkeys(range(1, NUM_LAYERS), "no"))
    plan = proven(model, prover, strategy="optimal")
    assert isinstance(plan.result, Plan)
    assert (plan.result.cuts, prover.asked) == ((), [])


@pytest.mark.parametrize("is_together", [True, False])
def test_the_best_of_legal_cuts_says_what_it_would_rather_have_had(
    model: ModelProfile, is_together: bool
) -> None:
    prover = Known({3: "layers share a cache"})
    plan = proven(model, prover, is_together=is_together)
    assert isinstance(plan.result, Plan)
    assert plan.result.cuts in ((2,), (4,))
    (note,) = plan.notes
    assert note.startswith("note: the best plan without proofs")
    assert note.endswith("has cuts that are not exact (before layer 3: layers share a cache)")
    assert render_plan(plan.result, nodes(GB, GB), plan.notes).endswith(note)


def test_legal_cuts_that_are_not_exact_together_are_refused(model: ModelProfile) -> None:
    with pytest.raises(UserError, match=r"this plan cuts the model where it is not exact \(before layer 4: "):
        proven(model, Known({1: "no", 3: "no", 5: "no"} | {2: "no"}, apart=[4]))


def test_a_model_that_cannot_be_cut_goes_to_one_node(model: ModelProfile) -> None:
    plan = proven(model, Known(dict.fromkeys(range(1, NUM_LAYERS), "its layers run twice")))
    assert isinstance(plan.result, Plan)
    assert plan.result.cuts == ()
    assert "its layers run twice" in plan.notes[0]


def test_a_model_that_cannot_be_cut_and_fits_no_node_is_refused(model: ModelProfile) -> None:
    whole = make_proven_plan(model, nodes(GB), [], PlanOptions(context=64), Known({}), is_together=True)
    assert isinstance(whole.result, Plan)
    need = whole.result.assignments[0].need_bytes
    small = nodes(int(need * 0.8), int(need * 0.8))
    options = PlanOptions(context=64)
    cut = make_proven_plan(model, small, [], options, Known({}), is_together=True)
    assert isinstance(cut.result, Plan)
    prover = Known(dict.fromkeys(range(1, NUM_LAYERS), "its layers run twice"))
    refused = make_proven_plan(model, small, [], options, prover, is_together=True).result
    assert isinstance(refused, Refusal)
    assert "can be cut nowhere (before layer" in refused.reason
    assert "its layers run twice), and so it has no plan: one node must hold it whole" in refused.reason
    assert refused.missing_bytes > 0
    prover = Known(dict.fromkeys((2, 3, 4, 5), "no"))
    refused = make_proven_plan(model, small, [], options, prover, is_together=True).result
    if isinstance(refused, Refusal):
        assert "can be cut only before layers 1 (" in refused.reason


def test_a_missing_proof_is_no_proof(model: ModelProfile) -> None:
    class Silent(Known):
        def prove(self, cuts: Sequence[int] | None) -> list[CutProof]:
            return [CutProof(1, False, None, "no tiny model can be built")]

    plan = proven(model, Silent({}), is_together=False)
    assert isinstance(plan.result, Plan)
    assert plan.result.cuts == ()
    assert "before layer 3: no tiny model can be built" in plan.notes[0]


def test_a_stop_ends_it(model: ModelProfile) -> None:
    prover = Known({3: "no"})
    prover.is_over = True
    assert prover.asked == []
    assert proven(model, prover).notes == ()
    assert prover.asked == [[3]]
