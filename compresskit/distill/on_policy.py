"""What is wrong with learning from the student's own text, told before weights are read."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, cast

from compresskit.distill.align.checks import KEPT
from compresskit.errors import Fault
from compresskit.modeling import context_length
from compresskit.options import Choice, option_faults
from compresskit.training.lesson import TEXT_ALONE
from compresskit.training.outlook import LONGEST_ROW
from compresskit.training.rollout import OnPolicy

if TYPE_CHECKING:
    from compresskit.distill.stage import Distill
    from compresskit.stage import Outlook


def on_policy_faults(stage: Distill, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with ``on_policy`` of ``stage``, in itself and beside the other fields."""
    if stage.on_policy is None:
        return []
    place, named = f"{where}.on_policy", cast(Choice, stage.on_policy)
    faults = []
    if named.method:
        faults.append(Fault(f"{place}.method", "no key method", repr(named.method), "Leave it out."))
    wrong = option_faults(OnPolicy, named.options, where=place)
    faults += wrong
    kept: Any = stage.teacher_placement
    if kept.method in KEPT:
        expected = "a teacher that runs beside the student: text that is not written yet has no scores"
        cure = "Leave on_policy out, or teacher_placement."
        faults.append(Fault(f"{where}.teacher_placement", expected, kept.method, cure))
    if stage.cross_entropy_weight or stage.loss == TEXT_ALONE:
        got = f"cross_entropy_weight {stage.cross_entropy_weight:g}"
        if stage.loss == TEXT_ALONE:
            got = f"loss: {TEXT_ALONE}"
        expected = "a teacher's loss alone: the student would learn to say what it said"
        faults.append(Fault(place, expected, got, "Leave the next-token loss out, or on_policy."))
    if not model.anatomy.is_causal or model.anatomy.head is None:
        expected, got = "a model that goes on from a prompt", type(model.config).__name__
        return [*faults, Fault(place, expected, got, "Leave on_policy out.")]
    return faults if wrong else faults + _room_faults(stage, model, place)


def _room_faults(stage: Distill, model: Outlook, place: str) -> list[Fault]:
    """Why prompt and response would not fit into a row."""
    policy = OnPolicy(**dict(cast(Choice, stage.on_policy).options))
    row = stage.context_length or min(context_length(model.config), LONGEST_ROW)
    prompt = ceil(policy.prompt_fraction * row)
    if prompt + policy.max_new_tokens <= row:
        return []
    got = f"a prompt of {prompt} (prompt_fraction {policy.prompt_fraction:g}) and {policy.max_new_tokens} new"
    cure = "Lower max_new_tokens or prompt_fraction, or raise context_length."
    return [Fault(place, f"at most {row} tokens, a row, for prompt and response", got, cure)]
