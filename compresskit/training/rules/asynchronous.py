"""What does not combine: steps that ranks take alone. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule
from compresskit.training.setting import Setting

EVERY_STEP = "every_step"
ZENFLOW = "zenflow"
ALONE = ("local_sgd", "diloco")
SYNCHRONISING = (EVERY_STEP, *ALONE, ZENFLOW)
BUCKET = 1 << 25
"""Numbers that are exchanged at once; of a larger tensor all."""


def _alone(s: Setting) -> bool:
    return s.fields.synchronise in ALONE


RULES: tuple[Rule, ...] = (
    Rule(
        "synchronise-name",
        "synchronise",
        lambda s: s.fields.synchronise not in SYNCHRONISING,
        f"one of {', '.join(SYNCHRONISING)}",
        "{synchronise!r}",
        "Choose one of these.",
    ),
    Rule(
        "alone-under-ddp",
        "synchronise",
        lambda s: _alone(s) and s.strategy != "ddp",
        "strategy ddp on 2 or more processes, each with the whole model, to step alone",
        "{synchronise} with strategy {strategy} on {processes}",
        "Use strategy ddp on several processes, or synchronise every_step.",
    ),
    Rule(
        "alone-every",
        "synchronise_every",
        lambda s: s.fields.synchronise_every < 1,
        "at least 1 step from exchange to exchange",
        "{synchronise_every}",
        "Raise synchronise_every; some tens to some hundreds of steps are usual.",
    ),
    Rule(
        "alone-delay",
        "synchronise_delay",
        lambda s: (
            s.fields.synchronise_delay != 0
            and not (
                s.fields.synchronise == "diloco"
                and 0 < s.fields.synchronise_delay < max(s.fields.synchronise_every, 1)
            )
        ),
        "0, or with synchronise diloco fewer steps than synchronise_every",
        "{synchronise_delay} with {synchronise} every {synchronise_every}",
        "Lower synchronise_delay.",
    ),
    Rule(
        "alone-outer",
        "outer_learning_rate",
        lambda s: not (s.fields.outer_learning_rate > 0 and 0 <= s.fields.outer_momentum < 1),
        "outer_learning_rate above 0 and outer_momentum in [0, 1)",
        "{outer_learning_rate} and {outer_momentum}",
        "Use 0.7 and 0.9, or what suits better.",
    ),
    Rule(
        "alone-fp16",
        "precision",
        lambda s: _alone(s) and s.fields.precision == "fp16",
        "fp32 or bf16 beside synchronise {synchronise}",
        "fp16, whose loss scale would part the ranks' schedules",
        "Use precision bf16.",
    ),
    Rule(
        "alone-evaluated",
        "eval_every",
        lambda s: (
            s.fields.synchronise == "local_sgd"
            and s.fields.synchronise_every >= 1
            and s.fields.eval_every % s.fields.synchronise_every != 0
        ),
        "a multiple of synchronise_every, after which all ranks have the same weights",
        "eval_every={eval_every}, synchronise_every={synchronise_every}",
        "Choose an eval_every that synchronise_every divides, or 0.",
    ),
    Rule(
        "alone-zeros-change",
        "synchronise",
        lambda s: _alone(s) and getattr(s.fields, "kind", "") == "sparse_train",
        "every_step in a stage that moves zeros, of which all ranks must have the same",
        "{synchronise}",
        "Use synchronise every_step here; finetune or distill after this stage may step alone.",
    ),
    Rule(
        "alone-on-policy",
        "synchronise",
        lambda s: _alone(s) and getattr(s.fields, "on_policy", None) is not None,
        "every_step beside on_policy",
        "{synchronise}",
        "Use synchronise every_step, or leave on_policy out.",
    ),
)
