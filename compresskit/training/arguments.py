"""TrainingArguments from our fields. What differs between engines is set, never left to a default."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn
from transformers import TrainingArguments

from compresskit.modeling.anatomy import anatomy_of
from compresskit.training.engine import claim, engine_arguments
from compresskit.training.setting import COLLECTIVE_S, Setting

CHECKPOINTS = "checkpoints"


def training_arguments(
    setting: Setting,
    model: nn.Module,
    *,
    steps: int,
    scratch: Path,
    seed: int,
    device: str,
    evaluates: bool,
) -> TrainingArguments:
    """TrainingArguments for a run; the engine is claimed first, as it must be.

    Args:
        setting: of the run.
        model: bare; its blocks are the units FSDP gathers.
        steps: optimiser steps.
        scratch: checkpoints go to a folder in it.
        seed: of dropout; the order of data is not left to the Trainer.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        evaluates: whether there are validation rows.
    """
    fields = setting.fields
    if ":" in device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    configured = claim(setting)
    blocks = anatomy_of(model).blocks
    classes = sorted({type(model.get_submodule(name)).__name__ for name in blocks})
    arguments = TrainingArguments(
        output_dir=str(scratch / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=setting.micro_batch_size,
        gradient_accumulation_steps=setting.passes,
        learning_rate=fields.peak_rate,
        lr_scheduler_type=fields.lr_schedule,
        warmup_steps=round(fields.warmup_fraction * steps),
        weight_decay=fields.weight_decay,
        max_grad_norm=fields.max_grad_norm,
        seed=seed,
        data_seed=seed,
        use_cpu=setting.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if fields.checkpoint_every else "no",
        save_steps=fields.checkpoint_every or 500,
        eval_strategy="steps" if fields.eval_every and evaluates else "no",
        eval_steps=fields.eval_every or None,
        ddp_timeout=int(COLLECTIVE_S),
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=setting.device == "cuda",
        dataloader_num_workers=fields.workers,
        dataloader_prefetch_factor=fields.prefetch if fields.workers else None,
        accelerator_config={"split_batches": False, "dispatch_batches": False, **configured},
        **engine_arguments(setting, classes),
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # one process means one device, never torch's DataParallel
    return arguments
