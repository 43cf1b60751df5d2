"""Train a live model on rows: the function every stage that trains, and any script, ends in."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils import logging

from compresskit.errors import DataError, Fault, PlanError
from compresskit.kernels.dispatch import used
from compresskit.modeling.anatomy import anatomy_of
from compresskit.training import checkpoint
from compresskit.training.access import access_for, cast_like, local_bytes
from compresskit.training.engine import accumulation_steps, claim, engine_arguments, resolve, running_engine
from compresskit.training.fields import TrainingFields
from compresskit.training.finite import require_finite_weights
from compresskit.training.objective import CrossEntropy, Objective, TeacherProvider
from compresskit.training.order import Ordered, Rows
from compresskit.training.redirect import redirected
from compresskit.training.rules import Setting, launched_processes, training_faults
from compresskit.training.trainer import StageTrainer
from compresskit.training.watch import LOSSES, LossLog, Watch

CHECKPOINTS = "checkpoints"
LAST = 10
"""Steps whose mean is the final training loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """What a training run came to; plain data, the same whenever the run is repeated.

    Attributes:
        steps: optimiser steps of the whole run.
        first_loss: of the first step, nats per supervised token.
        final_loss: mean over the last 10 steps.
        validation_loss: of the last evaluation; None where there was nothing to evaluate on.
        skipped_steps: that the fp16 loss scaler left out.
        engine: that ran: ``single``, ``ddp``, ``fsdp`` or ``deepspeed ZeRO-<stage>``.
        processes: that took part.
        parameter_bytes: that this rank kept between steps.
        kernels: op -> implementation.
        resumed_from: step this start continued from; 0 for a fresh one. Not part of a manifest.
        warnings: full sentences.
    """

    steps: int
    first_loss: float
    final_loss: float
    validation_loss: float | None
    skipped_steps: int
    engine: str
    processes: int
    parameter_bytes: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    resumed_from: int = 0
    warnings: tuple[str, ...] = ()


def fit(
    model: nn.Module,
    rows: Rows,
    *,
    fields: TrainingFields,
    scratch: Path,
    objective: Objective | None = None,
    teacher: TeacherProvider | None = None,
    validation: Rows | None = None,
    held: tuple[str, ...] = (),
    seed: int = 0,
    device: str = "auto",
    save: Callable[[Mapping[str, Tensor]], None] | None = None,
    title: str = "Training",
) -> TrainOutcome:
    """Train ``model`` in place; started again after a kill it continues at the last complete checkpoint.

    In a torchrun or accelerate launch every rank calls this with the same arguments.

    Args:
        model: a causal language model; its weights are fp32 while it trains and have their own dtype after.
        rows: map-style data set of {"input_ids", "labels", "position_ids"}, each int64 (T,); labels are not
            shifted, -100 is not supervised.
        fields: how to train; ``processes`` is not acted on here (see ``compresskit.training.launch``).
        scratch: directory for checkpoints and the loss log; survives a kill.
        objective: what to minimise; next-token cross entropy by default.
        teacher: for an objective that needs one.
        validation: rows for the evaluations.
        held: layers whose zero weights stay zero.
        seed: of data order and dropout.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        save: called on every rank at the end with the whole state dict in the model's own dtypes (empty except
            on the main process).
        title: of the progress line.

    Returns:
        The outcome, on every rank.

    Raises:
        PlanError: the fields do not combine; all faults together.
        DataError: there are no rows.
        EngineError: another engine runs than was asked for.
        NumericError: a loss, gradient or weight is not finite; names the step and the layer.
    """
    kind = resolve(device)
    faults = training_faults(fields, "training", device=kind)
    if faults:
        raise PlanError(*faults)
    if not len(rows):
        raise DataError(Fault("training data", "at least one row", "none", "Give more text."))
    setting = Setting(fields, launched_processes() or 1, kind)
    objective = objective or CrossEntropy()
    steps = fields.steps or max(1, math.ceil(fields.epochs * len(rows) / fields.batch_size))
    identity = _identity(fields, setting, steps, seed, len(rows), objective)
    scratch.mkdir(parents=True, exist_ok=True)
    start = checkpoint.latest(scratch / CHECKPOINTS, identity)
    access = access_for(setting.strategy, fields.zero_stage)
    log = LossLog(scratch / LOSSES)
    with _trainable(model, fields) as dtypes:
        arguments = _arguments(setting, model, steps, scratch, seed, device, validation is not None)
        main = arguments.process_index == 0
        done = checkpoint.step_of(start) if start else 0
        watch = _watch(log, title, steps, done, fields.batch_size * _width(rows)) if main else None
        trainer = StageTrainer(
            model,
            arguments,
            rows=Ordered(rows, steps=steps, batch_size=fields.batch_size, seed=seed),
            validation=validation,
            teacher=teacher,
            setting=setting,
            held=held,
            access=access,
            watch=watch,
            identity=identity,
        )
        head = teacher.head() if teacher is not None else None
        with trainer.resources, redirected(model, objective, precision=fields.precision, teacher_head=head):
            if watch is not None:
                with watch.progress, _quiet_transformers():
                    trainer.train(resume_from_checkpoint=str(start) if start else None)
            else:
                trainer.train(resume_from_checkpoint=str(start) if start else None)
            validated = trainer.last_evaluation()
        tensors = access.gather(model, keep=main and save is not None)
        require_finite_weights(tensors, steps)
        if save is not None:
            save(cast_like(tensors, dtypes))
        kept = local_bytes(access, model)
        engine = running_engine(trainer.model_wrapped, model)
    losses = log.losses() if main else [0.0]
    return TrainOutcome(
        steps=steps,
        first_loss=losses[0],
        final_loss=sum(losses[-LAST:]) / len(losses[-LAST:]),
        validation_loss=validated,
        skipped_steps=log.skipped() if main else 0,
        engine=engine,
        processes=setting.processes,
        parameter_bytes=kept,
        kernels=used(),
        resumed_from=done,
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own in between ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _watch(log: LossLog, title: str, steps: int, done: int, tokens_per_step: int) -> Watch:
    log.cut_after(done)
    return Watch(log, title=title, steps=steps, done=done, tokens_per_step=tokens_per_step)


def _width(rows: Rows) -> int:
    return int(rows[0]["input_ids"].shape[-1])


@contextmanager
def _trainable(model: nn.Module, fields: TrainingFields) -> Iterator[dict[str, torch.dtype]]:
    """fp32 weights and no generation cache while this lasts; yields each tensor's own dtype."""
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    model.float()
    if fields.activation_checkpointing:
        _checkpoint_activations(model)
    try:
        yield dtypes
    finally:
        if config is not None and before is not None:
            config.use_cache = before
        if fields.activation_checkpointing:
            _keep_activations(model)
        _restore(model, dtypes)


def _checkpoint_activations(model: nn.Module) -> None:
    """Non-reentrant, under either of the names transformers has for it."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]


def _keep_activations(model: nn.Module) -> None:
    name = "activation_checkpointing_disable"
    disable = getattr(model, name, None) or getattr(model, "gradient_checkpointing_disable")  # noqa: B009
    disable()


def _restore(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give whole tensors their own dtype again; an engine's shards are left to it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in dtypes and type(tensor.data) is Tensor and tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])


def _identity(
    fields: TrainingFields, setting: Setting, steps: int, seed: int, rows: int, objective: Objective
) -> str:
    """Which run a checkpoint belongs to; a change of anything here starts anew."""
    facts = {**asdict(fields), "steps": steps, "seed": seed, "rows": rows, "objective": repr(objective)}
    facts |= {"processes": setting.processes, "strategy": setting.strategy, "device": setting.device}
    for name in ("eval_every", "checkpoint_every"):
        facts.pop(name)
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _arguments(
    setting: Setting,
    model: nn.Module,
    steps: int,
    scratch: Path,
    seed: int,
    device: str,
    evaluates: bool,
) -> TrainingArguments:
    """TrainingArguments for this run; the engine is claimed first, as it must be."""
    fields = setting.fields
    if ":" in device:
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    configured = claim(setting)
    accumulation = accumulation_steps(fields, setting)
    blocks = anatomy_of(model).blocks
    classes = sorted({type(model.get_submodule(name)).__name__ for name in blocks})
    arguments = TrainingArguments(
        output_dir=str(scratch / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=setting.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=fields.learning_rate,
        lr_scheduler_type=fields.lr_schedule,
        warmup_steps=round(fields.warmup_fraction * steps),
        optim=fields.optimizer,
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
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=setting.device == "cuda",
        accelerator_config={"split_batches": False, "dispatch_batches": False, **configured},
        **engine_arguments(setting, classes, accumulation),
    )
    arguments._n_gpu = min(arguments._n_gpu, 1)  # one process means one device, never torch's DataParallel
    return arguments
