"""What does not combine when training, with the cure of each: one table. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from compresskit.training.fields import TrainingFields
from compresskit.training.int8 import multiplies_int8
from compresskit.training.trackers import PACKAGES

STRATEGIES = ("auto", "ddp", "fsdp", "deepspeed")
PRECISIONS = ("fp32", "bf16", "fp16")
MATMULS = ("float", "int8")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
COLLECTIVE_S = 1800.0
"""Seconds that ranks wait for one that does not come."""
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")
"""For adapters alone: a weight whose gradient has always been zero does not stay at zero with these."""
OPTIMIZERS = ("adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad", *EIGHT_BIT)
"""All but the 8-bit ones leave a weight at zero whose gradient has always been zero, so held zeros stay."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rule looks at: the fields, and where they will run.

    Attributes:
        fields: of the stage.
        processes: that take part; those of an existing launch where there is one.
        device: ``cpu`` or ``cuda``.
        devices: accelerators that this machine can give to processes of our own; 0 where that is no limit.
    """

    fields: TrainingFields
    processes: int
    device: str
    devices: int = 0

    @property
    def strategy(self) -> str:
        """The strategy in force.

        ``auto`` is what an existing launch asks Accelerate for, else ``ddp`` for several processes and
        ``single`` for one.
        """
        if self.fields.strategy != "auto":
            return self.fields.strategy
        launched = launched_processes() is not None
        for name in ("fsdp", "deepspeed"):
            if launched and os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
                return name
        return "ddp" if launched or self.processes > 1 else "single"

    @property
    def shards_parameters(self) -> bool:
        """Whether each process keeps only its part of the parameters between steps."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.fields.zero_stage == 3)

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass of one process."""
        return self.fields.micro_batch_size or max(1, self.fields.batch_size // self.processes)


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that does not combine.

    Attributes:
        name: short and stable; tests go by it.
        field: the field a user would change.
        broken: whether the rule is broken.
        expected: what would have been right.
        got: what was found, as a format string over the fields.
        cure: what to change.
    """

    name: str
    field: str
    broken: Callable[[Setting], bool]
    expected: str
    got: str
    cure: str


def _divides(s: Setting) -> bool:
    rows = s.micro_batch_size * s.processes
    return s.fields.batch_size >= rows and s.fields.batch_size % rows == 0


def _config_stage(s: Setting) -> bool:
    """Whether the user's ds_config.json names another ZeRO stage than the recipe."""
    stage = _read_config(s).get("zero_optimization", {}).get("stage", s.fields.zero_stage)
    return bool(stage != s.fields.zero_stage)


def _config_readable(s: Setting) -> bool:
    try:
        return isinstance(json.loads(Path(s.fields.deepspeed_config or "").read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


def _read_config(s: Setting) -> dict[str, dict[str, object]]:
    if s.strategy != "deepspeed" or s.fields.deepspeed_config is None or not _config_readable(s):
        return {}
    config: dict[str, dict[str, object]] = json.loads(Path(s.fields.deepspeed_config).read_text("utf-8"))
    return config


def _int8(s: Setting) -> bool:
    return s.fields.matmul == "int8"


RULES: tuple[Rule, ...] = (
    Rule(
        "strategy-name",
        "strategy",
        lambda s: s.fields.strategy not in STRATEGIES,
        "auto, ddp, fsdp or deepspeed",
        "{strategy!r}",
        "Choose one of these.",
    ),
    Rule(
        "precision-name",
        "precision",
        lambda s: s.fields.precision not in PRECISIONS,
        "fp32, bf16 or fp16",
        "{precision!r}",
        "Choose one of these.",
    ),
    Rule(
        "schedule-name",
        "lr_schedule",
        lambda s: s.fields.lr_schedule not in SCHEDULES,
        f"one of {', '.join(SCHEDULES)}",
        "{lr_schedule!r}",
        "Choose one of these.",
    ),
    Rule(
        "optimizer-name",
        "optimizer",
        lambda s: s.fields.optimizer not in OPTIMIZERS,
        f"one of {', '.join(OPTIMIZERS)}",
        "{optimizer!r}",
        "Choose one of these.",
    ),
    Rule(
        "zero-stage",
        "zero_stage",
        lambda s: s.fields.zero_stage not in (1, 2, 3),
        "1, 2 or 3",
        "{zero_stage}",
        "Choose one of these.",
    ),
    Rule(
        "batch-divides",
        "batch_size",
        lambda s: s.fields.batch_size >= 1 and (s.fields.micro_batch_size or 1) >= 1 and not _divides(s),
        "a multiple of processes x micro_batch_size",
        "batch_size={batch_size}, micro_batch_size={micro_batch_size} on {processes} processes",
        "Choose a batch_size that they divide, or set micro_batch_size.",
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
        "one-process-shards-nothing",
        "strategy",
        lambda s: s.processes == 1 and s.fields.strategy in ("ddp", "fsdp"),
        "at least 2 processes for strategy {strategy}",
        "1",
        "Set processes to 2 or more, or strategy to auto.",
    ),
    Rule(
        "deepspeed-missing",
        "strategy",
        lambda s: s.strategy == "deepspeed" and find_spec("deepspeed") is None,
        "the package deepspeed",
        "an environment without it",
        "Install it with `pip install compresskit[deepspeed]`, or use strategy fsdp.",
    ),
    Rule(
        "deepspeed-config-without-deepspeed",
        "deepspeed_config",
        lambda s: s.fields.deepspeed_config is not None and s.strategy != "deepspeed",
        "strategy deepspeed beside deepspeed_config",
        "strategy {strategy}",
        "Set strategy to deepspeed, or drop deepspeed_config.",
    ),
    Rule(
        "deepspeed-config-unreadable",
        "deepspeed_config",
        lambda s: (
            s.fields.deepspeed_config is not None and s.strategy == "deepspeed" and not _config_readable(s)
        ),
        "a JSON object in {deepspeed_config}",
        "no such file, or something else in it",
        "Correct the path or the file.",
    ),
    Rule(
        "deepspeed-config-stage",
        "zero_stage",
        _config_stage,
        "the ZeRO stage that {deepspeed_config} names",
        "zero_stage={zero_stage}",
        "Make the two agree, or take the stage out of the file.",
    ),
    Rule(
        "deepspeed-config-optimizer",
        "deepspeed_config",
        lambda s: bool({"optimizer", "scheduler"} & set(_read_config(s))),
        "no optimizer or scheduler in {deepspeed_config}",
        "one there, beside the recipe's own",
        "Take it out of the file: optimizer, learning_rate and lr_schedule of the recipe are used on every "
        "engine.",
    ),
    Rule(
        "deepspeed-config-precision",
        "deepspeed_config",
        lambda s: any(
            _read_config(s).get(kind, {}).get("enabled") not in (None, False, "auto")
            for kind in ("bf16", "fp16")
        ),
        "no bf16 or fp16 section enabled in {deepspeed_config}",
        "one there, beside the recipe's precision",
        "Take it out of the file and set precision in the recipe: weights are kept in fp32 on every engine.",
    ),
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
    Rule(
        "optimizer-8bit-missing",
        "optimizer",
        lambda s: s.fields.optimizer in EIGHT_BIT and find_spec("bitsandbytes") is None,
        "the package bitsandbytes",
        "an environment without it",
        "Install it with `pip install 'compresskit[qlora]'`, or use optimizer adamw_torch.",
    ),
    Rule(
        "optimizer-8bit-sharded",
        "optimizer",
        lambda s: s.fields.optimizer in EIGHT_BIT and s.strategy in ("fsdp", "deepspeed"),
        "adamw_torch with strategy {strategy}, which shards the optimiser's states itself",
        "{optimizer}",
        "Use optimizer adamw_torch, or strategy ddp.",
    ),
    Rule(
        "optimizer-paged-cpu",
        "optimizer",
        lambda s: s.fields.optimizer == "paged_adamw_8bit" and s.device == "cpu",
        "a GPU, whose memory is paged",
        "{optimizer} on a CPU",
        "Use optimizer adamw_8bit.",
    ),
    Rule(
        "prefix-checkpointing",
        "activation_checkpointing",
        lambda s: getattr(s.fields, "adapter", "") == "prefix" and s.fields.activation_checkpointing,
        "a prefix, which is a cache, without recomputed activations",
        "both",
        "Set activation_checkpointing to false, or use adapter lora.",
    ),
    Rule(
        "frozen-bits-sharded",
        "strategy",
        lambda s: getattr(s.fields, "base", "none") == "int8" and s.shards_parameters,
        "strategy ddp, or deepspeed with zero_stage 1 or 2, for weights frozen in int8",
        "strategy {strategy}, which shards weights of floating types",
        "Use strategy ddp, or base nf4.",
    ),
    Rule(
        "fp16-sharded",
        "precision",
        lambda s: s.fields.precision == "fp16" and s.strategy in ("fsdp", "deepspeed"),
        "fp32 or bf16 with strategy {strategy}",
        "fp16, whose loss scale must see the gradients of all ranks at once",
        "Use precision bf16, or strategy ddp.",
    ),
    Rule(
        "matmul-name",
        "matmul",
        lambda s: s.fields.matmul not in MATMULS,
        "float or int8",
        "{matmul!r}",
        "Choose one of these.",
    ),
    Rule(
        "matmul-int8-missing",
        "matmul",
        lambda s: _int8(s) and find_spec("torchao") is None,
        "the package torchao",
        "an environment without it",
        "Install it with `pip install 'compresskit[qat]'`, or use matmul float.",
    ),
    Rule(
        "matmul-int8-device",
        "matmul",
        lambda s: _int8(s) and find_spec("torchao") is not None and not multiplies_int8(s.device),
        "a GPU of compute capability 8.0 or higher with Triton, or a CPU where Triton finds no GPU",
        "a {device} for which torchao has no int8 product",
        "Use matmul float; for a CPU beside a GPU, hide the GPU: CUDA_VISIBLE_DEVICES= in the environment.",
    ),
    Rule(
        "matmul-int8-stage",
        "matmul",
        lambda s: (
            _int8(s)
            and (
                getattr(s.fields, "kind", "") in ("qat", "qlora")
                or getattr(s.fields, "swaps_layers", False)
                or getattr(s.fields, "trainable", "") == "lora"
            )
        ),
        "float in a stage whose layers compute with rounded, frozen or masked weights",
        "{matmul}",
        "Use matmul float; int8 is for finetune and distill without lora.",
    ),
    Rule(
        "matmul-int8-deepspeed",
        "matmul",
        lambda s: _int8(s) and s.strategy == "deepspeed",
        "float with strategy deepspeed",
        "{matmul}",
        "Use strategy ddp or fsdp, or matmul float.",
    ),
    Rule(
        "matmul-int8-fp16",
        "precision",
        lambda s: _int8(s) and s.fields.precision == "fp16",
        "fp32 or bf16 beside matmul int8, whose sums of integers overflow fp16",
        "{precision}",
        "Use precision bf16, or matmul float.",
    ),
)


def launched_processes() -> int | None:
    """The processes of the torchrun or accelerate launch this process belongs to; None outside of one."""
    if "LOCAL_RANK" not in os.environ or "RANK" not in os.environ:
        return None
    return int(os.environ.get("WORLD_SIZE", "1"))


def passes_per_step(fields: TrainingFields) -> int:
    """Forward passes of one process per optimiser step, here and now."""
    setting = Setting(fields, launched_processes() or fields.processes, "cpu")
    return fields.batch_size // (setting.micro_batch_size * setting.processes)


def this_rank() -> int:
    """The rank of this process in its launch; outside of one 0, the rank that writes and tells."""
    return int(os.environ.get("RANK", "0")) if launched_processes() is not None else 0
