"""What does not combine: pipelines, whose ranks have some blocks of the model each. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule
from compresskit.training.setting import Setting

SCHEDULES = ("gpipe", "1f1b", "interleaved")
STAGES_A_RANK = {"interleaved": 2}
"""Where it is more than one."""
KINDS = ("qat", "qlora", "sparse_train")
PLACEMENTS = ("replicate", "cache")


def _divided(s: Setting) -> bool:
    return s.fields.pipeline_stages > 1


def _micro_batches(s: Setting) -> int:
    """Of one pipeline in a step."""
    return s.fields.batch_size // (s.data_ranks * s.micro_batch_size)


def _uneven(s: Setting) -> bool:
    """Whether the schedule asks for another number of micro-batches."""
    count, stages = _micro_batches(s), s.fields.pipeline_stages
    if not _divided(s) or s.fields.pipeline_schedule == "gpipe" or count < 1:
        return False
    rounds = max(1, count // stages) if s.fields.pipeline_schedule == "interleaved" else 1
    return count < stages or count % rounds != 0


def _taught_elsewhere(s: Setting) -> bool:
    placement = getattr(s.fields, "teacher_placement", "replicate")
    return getattr(placement, "method", placement) not in PLACEMENTS


def _adapted(s: Setting) -> bool:
    kind = getattr(s.fields, "kind", "")
    return kind in KINDS or getattr(s.fields, "trainable", "all") != "all"


RULES: tuple[Rule, ...] = (
    Rule(
        "pipeline-schedule-name",
        "pipeline_schedule",
        lambda s: s.fields.pipeline_schedule not in SCHEDULES,
        f"one of {', '.join(SCHEDULES)}",
        "{pipeline_schedule!r}",
        "Choose one of these.",
    ),
    Rule(
        "pipeline-divides",
        "pipeline_stages",
        lambda s: s.fields.pipeline_stages < 1 or s.processes % s.fields.pipeline_stages != 0,
        "1, or a number that divides processes={processes}",
        "{pipeline_stages}",
        "Make processes a multiple of pipeline_stages.",
    ),
    Rule(
        "pipeline-strategy",
        "strategy",
        lambda s: _divided(s) and s.strategy not in ("single", "ddp"),
        "strategy ddp or auto beside pipeline_stages={pipeline_stages}: stages are whole on their ranks",
        "{strategy}",
        "Use strategy auto, or pipeline_stages 1.",
    ),
    Rule(
        "pipeline-micro-batches",
        "micro_batch_size",
        _uneven,
        "micro-batches of a step for each of {pipeline_stages} stages, in whole rounds where interleaved",
        "batch_size={batch_size} in micro-batches of {micro_batch_size} on {data_ranks} pipelines",
        "Lower micro_batch_size or raise batch_size, or use pipeline_schedule gpipe.",
    ),
    Rule(
        "pipeline-precision",
        "precision",
        lambda s: _divided(s) and s.fields.precision not in ("fp32", "bf16"),
        "fp32 or bf16 beside pipeline_stages={pipeline_stages}",
        "{precision}",
        "Use precision bf16, or pipeline_stages 1.",
    ),
    Rule(
        "pipeline-matmul",
        "matmul",
        lambda s: _divided(s) and s.fields.matmul != "float",
        "float beside pipeline_stages={pipeline_stages}",
        "{matmul}",
        "Use matmul float, or pipeline_stages 1.",
    ),
    Rule(
        "pipeline-alone",
        "synchronise",
        lambda s: _divided(s) and s.fields.synchronise != "every_step",
        "every_step beside pipeline_stages={pipeline_stages}",
        "{synchronise}",
        "Use synchronise every_step, or pipeline_stages 1.",
    ),
    Rule(
        "pipeline-adapted",
        "pipeline_stages",
        lambda s: _divided(s) and _adapted(s),
        "1 in a stage that rounds, adapts or moves zeros while it trains, which looks at all layers",
        "{pipeline_stages}",
        "Set pipeline_stages to 1 here; finetune and distill of all weights may be divided.",
    ),
    Rule(
        "pipeline-teacher",
        "teacher_placement",
        lambda s: _divided(s) and _taught_elsewhere(s),
        f"{' or '.join(PLACEMENTS)} beside pipeline_stages={{pipeline_stages}}: the last stage alone has it",
        "another placement",
        "Use teacher_placement replicate or cache, or pipeline_stages 1.",
    ),
    Rule(
        "pipeline-learns",
        "pipeline_stages",
        lambda s: (
            _divided(s)
            and (
                s.fields.learns_sentences
                or getattr(s.fields, "features", None) is not None
                or getattr(s.fields, "on_policy", None) is not None
            )
        ),
        "1 beside sentences, features or on_policy, which need more than the last stage's states",
        "{pipeline_stages}",
        "Set pipeline_stages to 1, or leave these out.",
    ),
)
