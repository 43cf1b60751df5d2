"""What does not combine: exchanges during computation, and the trace that shows them. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule

UNTRACED = 2
"""Steps before the first that is traced."""

RULES: tuple[Rule, ...] = (
    Rule(
        "overlap-always",
        "overlap",
        lambda s: (
            not s.fields.overlap and (s.strategy not in ("ddp", "deepspeed") or s.fields.pipeline_stages > 1)
        ),
        "overlap left at true: with strategy {strategy} there is nothing to exchange, or no way not to",
        "false",
        "Leave overlap out, or use strategy ddp or deepspeed.",
    ),
    Rule(
        "trace-steps",
        "trace",
        lambda s: s.fields.trace > 0 and s.fields.trace + UNTRACED > (s.fields.steps or 1 << 62),
        "at most steps - 2, since the first two are not traced",
        "trace={trace} of {steps} steps",
        "Lower trace, or raise steps.",
    ),
)
