"""What does not combine: shares of ranks by their speed. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule
from compresskit.training.rules.memory import COUNT
from compresskit.training.setting import Setting

MEASURED = "measured"
SHARES = ("equal", MEASURED)


def _measured(s: Setting) -> bool:
    return s.fields.shares == MEASURED


RULES: tuple[Rule, ...] = (
    Rule(
        "shares-name",
        "shares",
        lambda s: s.fields.shares not in SHARES,
        " or ".join(SHARES),
        "{shares!r}",
        "Choose one of these.",
    ),
    Rule(
        "shares-engine",
        "shares",
        lambda s: (
            _measured(s)
            and (
                s.strategy != "ddp"
                or s.fields.pipeline_stages > 1
                or s.fields.synchronise != "every_step"
                or getattr(getattr(s.fields, "teacher_placement", None), "method", "") == "shard"
            )
        ),
        "equal but under ddp, where forward passes, a teacher's too, wait for no other rank",
        "{shares} with strategy {strategy} on {processes}",
        "Use strategy ddp on several processes, without pipeline_stages, synchronise and a teacher in parts; "
        "or leave shares out.",
    ),
    Rule(
        "shares-passes",
        "micro_batch_size",
        lambda s: _measured(s) and s.micro_batch_size < 2,
        "at least 2 beside shares {shares}: all ranks take equally many passes, of unlike rows",
        "{micro_batch_size}",
        "Raise micro_batch_size, or leave shares out.",
    ),
    Rule(
        "shares-adapted",
        "shares",
        lambda s: _measured(s) and s.fields.adapt_batch != "none",
        "equal beside adapt_batch {adapt_batch}, which changes the passes of a step too",
        "{shares}",
        "Choose one of them.",
    ),
    Rule(
        "shares-counts",
        "shares",
        lambda s: _measured(s) and getattr(s.fields, "kind", "") in COUNT,
        "equal in a stage whose layers count the passes of a step",
        "{shares}",
        "Leave shares out; finetune, distill and qlora have them.",
    ),
    Rule(
        "shares-rows",
        "shares",
        lambda s: (
            _measured(s) and (s.fields.learns_sentences or getattr(s.fields, "on_policy", None) is not None)
        ),
        "equal where rows are sentences, balanced by their lengths, or on_policy draws for each rank",
        "{shares}",
        "Leave shares out.",
    ),
)
