"""The fields every stage that trains shares. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFields:
    """How to train; inherited by the stages that do.

    Attributes:
        steps: optimiser steps; None counts epochs instead.
        epochs: passes over the data, when ``steps`` is None.
        learning_rate: peak, after warm-up.
        batch_size: rows per optimiser step over all processes; accumulation and ranks divide it.
        micro_batch_size: rows per forward pass of one process; None is ``batch_size / processes``.
        context_length: tokens per row; None is the model's own maximum, 2048 at most.
        warmup_fraction: of the steps, linear.
        lr_schedule: a name transformers knows: ``cosine``, ``linear``, ``constant``.
        optimizer: a name transformers knows: ``adamw_torch``, ``adafactor``.
        weight_decay: decoupled.
        max_grad_norm: always set, on every engine.
        precision: ``fp32``, ``bf16`` or ``fp16`` (with dynamic loss scaling) compute; weights stay fp32.
        matmul: ``float``, in ``precision``, or ``int8`` (torchao): how the blocks' linear layers multiply
            while they train, forward and backward; evaluations multiply in float.
        activation_checkpointing: recompute activations in the backward pass.
        eval_every: steps between evaluations on the validation split; 0 evaluates at the end only.
        keep_best: give the weights of the best evaluation instead of those of the last step.
        trackers: services that are told of each step, through Accelerate: tensorboard, wandb, trackio.
        checkpoint_every: steps between checkpoints that a restart continues from; 0 keeps none.
        processes: training processes on this machine.
        strategy: ``ddp``, ``fsdp`` or ``deepspeed``; with one process ``auto`` is no wrapper at all.
        zero_stage: 1, 2 or 3 under ``deepspeed``.
        deepspeed_config: path of a ds_config.json of the user's own; its "auto" values are filled in.
    """

    keeps_grids: ClassVar[bool] = False
    """Whether weights that an earlier stage put on a grid stay on it."""
    loss_falls: ClassVar[bool] = True
    """Whether the loss should fall, so that a user is warned where it does not."""

    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 5e-4
    batch_size: int = 16
    micro_batch_size: int | None = None
    context_length: int | None = None
    warmup_fraction: float = 0.05
    lr_schedule: str = "cosine"
    optimizer: str = "adamw_torch"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    matmul: str = "float"
    activation_checkpointing: bool = False
    eval_every: int = 0
    keep_best: bool = False
    trackers: tuple[str, ...] = ()
    checkpoint_every: int = 100
    processes: int = 1
    strategy: str = "auto"
    zero_stage: int = 2
    deepspeed_config: str | None = None

    @property
    def reshapes(self) -> bool:
        """False: training changes values, not shapes."""
        return False

    @property
    def learns_sentences(self) -> bool:
        """Whether rows are sentences, and the model one without a next-token head."""
        return False

    @property
    def moves_weights(self) -> bool:
        """Whether the weights of layers are trained under their own names."""
        return True
