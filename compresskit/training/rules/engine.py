"""What does not combine: which engine trains, on how many processes. No torch."""

from __future__ import annotations

from compresskit.training.rules.base import Rule
from compresskit.training.setting import Setting

STRATEGIES = ("auto", "ddp", "fsdp", "tp", "deepspeed")

A_CORE, ANYWHERE = 4, 8
"""Processes that may be meant for each core of a CPU, and on any: who tries ranks out wants several."""


def _divides(s: Setting) -> bool:
    rows = s.micro_batch_size * s.data_ranks
    return s.fields.batch_size >= rows and s.fields.batch_size % rows == 0


RULES: tuple[Rule, ...] = (
    Rule(
        "strategy-name",
        "strategy",
        lambda s: s.fields.strategy not in STRATEGIES,
        "auto, ddp, fsdp, tp or deepspeed",
        "{strategy!r}",
        "Choose one of these.",
    ),
    Rule(
        "more-processes-than-devices",
        "processes",
        lambda s: s.device == "cuda" and 0 < s.devices < s.processes,
        "at most one process per GPU, of which this machine has {devices}",
        "{processes}",
        "Lower processes (--nproc), or set device to cpu.",
    ),
    Rule(
        "more-processes-than-cores",
        "processes",
        lambda s: s.device == "cpu" and s.cores > 0 and s.processes > max(ANYWHERE, A_CORE * s.cores),
        f"at most {ANYWHERE} processes on a CPU, or {A_CORE} for each of the {{cores}} cores usable here",
        "{processes}",
        "Lower processes (--nproc); of GPUs that are elsewhere `compresskit plan --gpus` tells.",
    ),
    Rule(
        "one-process-shards-nothing",
        "strategy",
        lambda s: s.processes == 1 and s.fields.strategy in ("ddp", "fsdp", "tp"),
        "at least 2 processes for strategy {strategy}",
        "1",
        "Set processes to 2 or more, or strategy to auto.",
    ),
    Rule(
        "batch-divides",
        "batch_size",
        lambda s: s.fields.batch_size >= 1 and (s.fields.micro_batch_size or 1) >= 1 and not _divides(s),
        "a multiple of processes / tensor_parallel x micro_batch_size",
        "batch_size={batch_size}, micro_batch_size={micro_batch_size} on {processes} processes",
        "Choose a batch_size that they divide, or set micro_batch_size.",
    ),
    Rule(
        "frozen-bits-sharded",
        "strategy",
        lambda s: getattr(s.fields, "base", "none") == "int8" and s.shards_parameters,
        "strategy ddp, or deepspeed with zero_stage 1 or 2, for weights frozen in int8",
        "strategy {strategy}, which shards weights of floating types",
        "Use strategy ddp, or base nf4.",
    ),
)
