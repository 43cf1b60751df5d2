"""What DeepSpeed is told, and what it made of it: the ds_config.json, and what is kept off the device.

ZeRO-Offload (Ren et al. 2021) keeps the states of the optimiser and the weights that it steps on the CPU, and
steps there; ZeRO-Infinity (Rajbhandari et al. 2021) keeps the shards of ZeRO-3 there too, or on NVMe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from compresskit.errors import EngineError, Fault
from compresskit.training.fields import TrainingFields
from compresskit.training.rules.asynchronous import ZENFLOW
from compresskit.training.rules.deepspeed import AUTO
from compresskit.training.rules.zenflow import SELECTED, span
from compresskit.training.setting import Setting


def deepspeed_config(setting: Setting) -> dict[str, Any]:
    """The user's ds_config.json with its gaps and "auto" values filled in, or one of our own.

    Args:
        setting: of the run; its fields name the user's file, if any, which has been checked against them.
    """
    fields = setting.fields
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setting.micro_batch_size,
        "gradient_accumulation_steps": setting.passes,
        "train_batch_size": fields.batch_size,
        "gradient_clipping": fields.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": fields.zero_stage,
            "overlap_comm": fields.overlap,
            "stage3_gather_16bit_weights_on_model_save": True,
            **offload_sections(fields),
        },
        # With offload too the recipe's own optimiser steps, on the CPU; else only DeepSpeed's Adam might.
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }
    if fields.synchronise == ZENFLOW:
        ours["zero_optimization"]["zenflow"] = zenflow_section(fields)
        values = dict.fromkeys(("betas", "eps", "weight_decay"), AUTO)
        ours["optimizer"] = {"type": "AdamW", "params": {"lr": fields.peak_rate, **values}}
    if fields.deepspeed_config is None:
        return ours
    theirs = json.loads(Path(fields.deepspeed_config).read_text(encoding="utf-8"))
    return _filled(theirs, ours)


def _filled(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """``theirs``, and ``ours`` wherever they say nothing or "auto"."""
    merged = dict(theirs)
    for name, value in ours.items():
        if merged.get(name, AUTO) == AUTO:
            merged[name] = value
        elif isinstance(value, dict) and isinstance(merged[name], dict):
            merged[name] = _filled(merged[name], value)
    return merged


def zenflow_section(fields: TrainingFields) -> dict[str, Any]:
    """Of ``zero_optimization``; the CPU steps in this process, so that its states are in checkpoints."""
    every = fields.synchronise_every
    return {
        "topk_ratio": SELECTED,
        "update_interval": every,
        "select_strategy": "step",
        "select_interval": span(every),
        "overlap_step": False,
    }


def offload_sections(fields: TrainingFields) -> dict[str, Any]:
    """The parts of ``zero_optimization`` that say what is kept off the device."""
    place: dict[str, Any] = {"device": fields.offload_device}
    if fields.offload_device == "nvme":
        place["nvme_path"] = fields.nvme_path
    sections = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}
    return {f"offload_{section}": dict(place) for section in sections[fields.offload]}


def offloaded(wrapped: nn.Module) -> str:
    """``none``, ``optimizer`` or ``parameters``, by what DeepSpeed's optimiser does."""
    optimizer: Any = getattr(wrapped, "optimizer", None)
    if getattr(optimizer, "offload_param", False):
        return "parameters"
    on_cpu = getattr(optimizer, "offload_optimizer", False) or getattr(optimizer, "cpu_offload", False)
    return "optimizer" if on_cpu else "none"


def require_offload(setting: Setting, wrapped: nn.Module) -> None:
    """Look at what DeepSpeed offloads; EngineError unless it is what was asked for.

    Args:
        setting: what was asked for; nothing asked for leaves it to a ds_config.json of the user's own.
        wrapped: what training calls.
    """
    asked, found = setting.fields.offload, offloaded(wrapped)
    if asked not in ("none", found):
        cure = "Use another version of deepspeed, or set offload to none."
        raise EngineError(Fault("offload", asked, found, cure))
