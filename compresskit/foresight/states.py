"""What a process holds of parameters between steps: exact, from shapes alone.

While it trains a weight is in float32, whatever it is stored in, so nothing here depends on the precision.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compresskit.training.fields import TrainingFields
from compresskit.training.optimizers import OPTIMIZERS
from compresskit.training.rules.asynchronous import ALONE, EVERY_STEP
from compresskit.training.setting import Setting

Shape = tuple[int, ...]
ITEM = 4
"""Bytes of a weight, of a gradient and of a number that an optimiser keeps."""
STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "adam": 2.0,
    "lion_32bit": 1.0,
    "rmsprop": 1.0,
    "adagrad": 1.0,
    "muon": 1.0,
    "sgd": 0.0,
    "adamw_8bit": 0.5 + 2 / 256,
    "paged_adamw_8bit": 0.5 + 2 / 256,
    "lion_8bit": 0.25 + 1 / 256,
}
"""Numbers in float32 that an optimiser keeps of each weight, scales of 8-bit states among them, one in 256.

Those that are not here: as ``compresskit.training.optimizers`` has them for matrices.
"""
FACTORED = "adafactor"
LEAST_8BIT = 4096
"""Weights of a tensor; states of a smaller one are in float32."""
BUCKET, LIVE, WHOLE = "reduce_bucket_size", "stage3_max_live_parameters", "stage3_param_persistence_threshold"
REUSE, PREFETCH = "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"
ZERO_DEFAULTS = {BUCKET: 5e8, LIVE: 1e9, WHOLE: 1e5, REUSE: 1e9, PREFETCH: 5e7}
"""Numbers that DeepSpeed takes where its configuration says none."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a stage trains, and what it holds besides.

    Attributes:
        trained: shapes of the parameters that take a gradient.
        frozen: shapes of those that take none, in float32, which an engine may divide.
        packed_bytes: of weights frozen in four bits, which an engine that divides weights divides too.
        whole_bytes: of their scales and of weights frozen in eight, in each process.
        extra_bytes: of masks and of copies of weights that are rounded or masked, in each process.
    """

    trained: tuple[Shape, ...]
    frozen: tuple[Shape, ...] = ()
    packed_bytes: int = 0
    whole_bytes: int = 0
    extra_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine divides what is held.

    Attributes:
        kind: ``single``, ``ddp``, ``fsdp``, ``tp``, ``pipeline``, ``zero1``, ``zero2`` or ``zero3``.
        shards: processes among which states are divided; 1 where nothing is.
        bucket: numbers of gradients that ZeRO reduces together.
        live: numbers of parameters beyond which ZeRO-3 gathers none ahead.
        reuse: numbers of others before whose use a parameter is not given up by ZeRO-3.
        prefetch: numbers of parameters that ZeRO-3 gathers ahead together.
        whole: a parameter of so many numbers or fewer is never divided by ZeRO-3.
        offloads: whether the optimiser's states and the weights it steps lie in the host's memory.
        synchronise: how ranks come to have the same weights, as the stage's field names it.
        every: steps from one exchange of weights, or one late update, to the next.
        delay: steps that ranks go on while an exchange is under way.
    """

    kind: str
    shards: int = 1
    bucket: int = 0
    live: int = 0
    reuse: int = 0
    prefetch: int = 0
    whole: int = 0
    offloads: bool = False
    synchronise: str = EVERY_STEP
    every: int = 1
    delay: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether ranks step alone."""
        return self.synchronise in ALONE

    @property
    def has_views(self) -> bool:
        """Whether gradients are views of DDP's buckets, as they are where it sums them up."""
        return self.kind == "ddp" and not self.is_alone

    @property
    def divides_weights(self) -> bool:
        """Whether each process keeps a part of the weights between steps."""
        return self.kind in ("fsdp", "zero3")

    @property
    def divides_gradients(self) -> bool:
        """Whether each process keeps a part of the gradients."""
        return self.kind in ("fsdp", "zero2", "zero3")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed trains."""
        return self.kind.startswith("zero")

    def part(self, shapes: Iterable[Shape]) -> int:
        """Numbers of parameters of these ``shapes`` that the fullest process keeps where they are divided."""
        if self.kind == "fsdp":  # by rows
            return sum(-(-(s[0] if s else 1) // self.shards) * prod(s[1:]) for s in shapes)
        if self.kind == "zero3":
            return sum(-(-prod(s) // self.shards) for s in shapes)
        return -(-numbers(shapes) // self.shards)


def engine_of(setting: Setting) -> Engine:
    """How the engine of ``setting`` divides."""
    fields = setting.fields
    shards = setting.processes // (fields.replicas * fields.tensor_parallel)
    if fields.pipeline_stages > 1:
        return Engine("pipeline")
    if setting.strategy == "fsdp":
        return Engine("fsdp", max(shards, 1))
    seldom: dict[str, Any] = {}
    if fields.synchronise != EVERY_STEP:
        every, delay = fields.synchronise_every, fields.synchronise_delay
        seldom = {"synchronise": fields.synchronise, "every": every, "delay": delay}
    if setting.strategy != "deepspeed":
        return Engine(setting.strategy, **seldom)
    zero = _zero_section(fields)
    read = {n: int(float(zero[n])) if _is_number(zero.get(n)) else int(d) for n, d in ZERO_DEFAULTS.items()}
    offload = zero.get("offload_optimizer") or {}
    offloads = getattr(fields, "offload", "none") != "none" or offload.get("device", "none") != "none"
    said = zero.get("overlap_comm", "auto")
    doubles = fields.zero_stage < 3 and (fields.overlap if said == "auto" else said)
    return Engine(
        f"zero{fields.zero_stage}",
        max(shards, 1),
        bucket=read[BUCKET] * (2 if doubles else 1),
        live=read[LIVE],
        reuse=read[REUSE],
        prefetch=read[PREFETCH],
        whole=read[WHOLE],
        offloads=offloads,
        **seldom,
    )


def _zero_section(fields: TrainingFields) -> dict[str, Any]:
    """What the user's ds_config.json says of ZeRO; nothing where there is none to read."""
    if fields.deepspeed_config is None:
        return {}
    try:
        read = json.loads(Path(fields.deepspeed_config).read_text(encoding="utf-8"))
        return dict(read.get("zero_optimization") or {})
    except (OSError, ValueError, AttributeError):
        return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(shapes: Iterable[Shape]) -> int:
    """Of all parameters of these shapes."""
    return sum(map(prod, shapes))


def weight_bytes(held: Held, engine: Engine) -> int:
    """Of the weights that the model computes with, as one process keeps them between passes."""
    shapes = (*held.trained, *held.frozen)
    kept = engine.part(shapes) if engine.divides_weights else numbers(shapes)
    return ITEM * kept


def frozen_bytes(held: Held, engine: Engine) -> int:
    """Of weights frozen in few bits, as one process keeps them between passes; packed ones pass for fp32."""
    count = held.packed_bytes // ITEM
    return held.whole_bytes + ITEM * (engine.part(((count,),)) if engine.divides_weights else count)


def master_bytes(held: Held, engine: Engine) -> int:
    """Of a second copy of the trained weights, the one that is stepped; only ZeRO has it."""
    return ITEM * engine.part(held.trained) if engine.is_zero else 0


def gradient_bytes(held: Held, engine: Engine) -> int:
    """Of the gradients of one process when the optimiser steps."""
    divided = engine.divides_gradients or engine.is_zero
    return ITEM * (engine.part(held.trained) if divided else numbers(held.trained))


def optimizer_bytes(held: Held, engine: Engine, optimizer: str) -> int:
    """Of what ``optimizer`` keeps from step to step in one process."""
    shapes = held.trained
    if optimizer == FACTORED:
        return ITEM * sum(_factors(shape) for shape in shapes) // (engine.shards if engine.shards > 1 else 1)
    each = STATES.get(optimizer, OPTIMIZERS[optimizer].matrix_bytes / ITEM)
    small = [s for s in shapes if prod(s) < LEAST_8BIT] if "8bit" in optimizer else []
    divides = engine.divides_gradients or engine.is_zero
    kept, whole = (engine.part(s) if divides else numbers(s) for s in (shapes, small))
    return round(ITEM * (each * (kept - whole) + 2 * whole))


def _factors(shape: Shape) -> int:
    """Numbers that Adafactor keeps: of a matrix one for each row and each column."""
    return prod(shape) if len(shape) < 2 else prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def stepping_bytes(held: Held, engine: Engine, optimizer: str, device: str) -> int:
    """Of what the optimiser makes while it steps, beyond its states: about two copies of what it looks at.

    On a GPU torch's optimisers look at all parameters at once, on a CPU at one; ZeRO's parameters are one.
    One that is fused makes nothing.
    """
    if optimizer not in ("rmsprop", "adagrad") or not held.trained:
        return 0
    sizes = [engine.part([s]) if engine.divides_gradients else prod(s) for s in held.trained]
    if engine.is_zero:
        return ITEM * 2 * engine.part(held.trained)
    return ITEM * (sum(sizes) if device == "cuda" else 2 * max(sizes))
