"""What does not combine: evaluations, the best of them, and trackers. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from compresskit.training.rules.base import Rule
from compresskit.training.trackers import PACKAGES

RULES: tuple[Rule, ...] = (
    Rule(
        "best-without-evaluations",
        "keep_best",
        lambda s: s.fields.keep_best and not s.fields.eval_every,
        "eval_every above 0 beside keep_best",
        "evaluations at the end only",
        "Set eval_every to a number of steps, or leave keep_best out.",
    ),
    Rule(
        "best-while-zeros-change",
        "keep_best",
        lambda s: s.fields.keep_best and getattr(s.fields, "kind", "") == "sparse_train",
        "the last step's weights, which alone have all the zeros",
        "keep_best",
        "Leave keep_best out; finetune or distill after this stage may have it.",
    ),
    Rule(
        "tracker-name",
        "trackers",
        lambda s: not set(s.fields.trackers) <= set(PACKAGES),
        f"names of {', '.join(PACKAGES)}",
        "{trackers}",
        "Choose from these.",
    ),
    Rule(
        "tracker-missing",
        "trackers",
        lambda s: any(find_spec(PACKAGES[n]) is None for n in s.fields.trackers if n in PACKAGES),
        "the packages of {trackers}",
        "an environment without one of them",
        "Install it with pip, or leave trackers out.",
    ),
)
