"""The fields every stage that trains shares. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any, ClassVar

from compresskit.options import Options, freeze_options


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFields:
    """How to train; inherited by the stages that do.

    Attributes:
        steps: optimiser steps; None counts epochs instead.
        epochs: passes over the data, when ``steps`` is None; the rows are the limit, however the batch grows.
        learning_rate: peak, after warm-up.
        learning_rate_scaling: ``none``, ``linear`` or ``sqrt``: multiply learning_rate by how often
            reference_batch_size goes into batch_size, or by the root of that.
        reference_batch_size: that learning_rate was found for.
        batch_size: rows per optimiser step over all processes; accumulation and ranks divide it.
        micro_batch_size: rows per forward pass of one process; None is ``batch_size / processes``.
        context_length: tokens per row; None is the model's own maximum, 2048 at most.
        warmup_fraction: of the steps, linear.
        lr_schedule: a name transformers knows: ``cosine``, ``linear``, ``constant``.
        optimizer: a name of transformers or torch: ``adamw_torch``, ``adafactor``, ``lion_8bit``, ``muon``.
        optimizer_options: its own fields, such as ``{betas: [0.9, 0.95]}``.
        weight_decay: decoupled; ``adam``, ``adamax``, ``adadelta``, ``adagrad``, ``rmsprop``, ``sgd`` add it
            to the gradient.
        max_grad_norm: always set, on every engine.
        precision: ``fp32``, ``bf16`` or ``fp16`` (with dynamic loss scaling) compute; weights stay fp32;
            ``fp8`` is bf16 with the products of blocks in fp8, where the GPU has them.
        matmul: ``float``, in ``precision``, or ``int8`` (torchao): how the blocks' linear layers multiply
            while they train, forward and backward; evaluations multiply in float.
        activation_checkpointing: recompute activations in the backward pass.
        checkpoint_blocks: recompute those of every n-th block alone.
        checkpoint_operators: keep the outputs of matrix products and attention, recompute the rest.
        offload_activations: what blocks keep for the backward pass waits in the memory of the host.
        adapt_batch: ``memory`` halves the rows of a pass where memory runs out, and takes more passes;
            ``noise`` doubles the rows of a step where the noise scale of gradients has reached that many.
        largest_batch_size: that ``noise`` may come to; learning_rate_scaling says what the rate does then.
        shares: ``equal``, or under ``ddp`` ``measured``: rows of a step as each rank's speed allows.
        eval_every: steps between evaluations on the validation split; 0 evaluates at the end only.
        keep_best: give the weights of the best evaluation instead of those of the last step.
        trackers: services that are told of each step, through Accelerate: tensorboard, wandb, trackio.
        workers: processes beside each training process that read rows ahead; 0 reads in between steps. The
            rows are the same.
        prefetch: micro-batches that each of them reads ahead.
        checkpoint_every: steps between checkpoints that a restart continues from; 0 keeps none.
        processes: training processes on this machine.
        strategy: ``ddp``, ``fsdp``, ``tp`` or ``deepspeed``; with one process ``auto`` is no wrapper at all.
        replicas: copies of the model under ``fsdp``, each divided among its own processes.
        tensor_parallel: neighbouring processes that split each layer and see the same rows; under ``tp``
            all of them, under ``fsdp`` those that share what is else a process's own.
        zero_stage: 1, 2 or 3 under ``deepspeed``.
        deepspeed_config: path of a ds_config.json of the user's own; its "auto" values are filled in.
        synchronise: ``every_step``, or under ``ddp`` ``local_sgd`` or ``diloco``: ranks step alone and
            exchange weights every ``synchronise_every`` steps: their mean, or an outer optimiser's step. Or
            under ``deepspeed`` ``zenflow``: the CPU steps all weights every ``synchronise_every`` steps, the
            device a tenth of the columns at each.
        synchronise_every: steps of the optimiser from exchange to exchange, or from one late update to the
            next.
        synchronise_from: steps at the start that average gradients over ranks, before these step alone.
        synchronise_delay: steps that ``diloco`` goes on while an exchange is under way.
        outer_learning_rate: of ``diloco``'s outer SGD.
        outer_momentum: of ``diloco``'s outer SGD, Nesterov's.
        pipeline_stages: processes that divide the model's blocks among them, one after another; several
            such pipelines lie side by side on more processes, each with rows of its own.
        pipeline_schedule: ``gpipe``, ``1f1b``, or ``interleaved`` with two stages a process.
        offload: what ``deepspeed`` keeps off the device: ``none``; ``optimizer``, its states and steps; or
            ``parameters`` as well, with ``zero_stage`` 3.
        offload_device: where to: ``cpu``, or ``nvme`` below ``nvme_path``.
        nvme_path: a directory on a local NVMe drive.
        overlap: whether processes exchange gradients and weights while they compute.
        trace: steps whose operations and exchanges are written down as a Chrome trace; 0 for none.
    """

    keeps_grids: ClassVar[bool] = False
    """Whether weights that an earlier stage put on a grid stay on it."""
    loss_falls: ClassVar[bool] = True
    """Whether the loss should fall, so that a user is warned where it does not."""

    steps: int | None = None
    epochs: float = 1.0
    learning_rate: float = 5e-4
    learning_rate_scaling: str = "none"
    reference_batch_size: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    context_length: int | None = None
    warmup_fraction: float = 0.05
    lr_schedule: str = "cosine"
    optimizer: str = "adamw_torch"
    optimizer_options: Mapping[str, Any] | Options = ()
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    matmul: str = "float"
    activation_checkpointing: bool = False
    checkpoint_blocks: int = 1
    checkpoint_operators: bool = False
    offload_activations: bool = False
    adapt_batch: str = "none"
    largest_batch_size: int | None = None
    shares: str = "equal"
    eval_every: int = 0
    keep_best: bool = False
    trackers: tuple[str, ...] = ()
    workers: int = 0
    prefetch: int = 2
    checkpoint_every: int = 100
    processes: int = 1
    strategy: str = "auto"
    replicas: int = 1
    tensor_parallel: int = 1
    zero_stage: int = 2
    deepspeed_config: str | None = None
    synchronise: str = "every_step"
    synchronise_every: int = 8
    synchronise_from: int = 0
    synchronise_delay: int = 0
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.9
    pipeline_stages: int = 1
    pipeline_schedule: str = "1f1b"
    offload: str = "none"
    offload_device: str = "cpu"
    nvme_path: str | None = None
    overlap: bool = True
    trace: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer_options", freeze_options(self.optimizer_options))

    @property
    def peak_rate(self) -> float:
        """The learning rate after warm-up, for the batch there is.

        Papers: linear, Goyal et al., https://arxiv.org/abs/1706.02677; the root for Adam, Malladi
        et al., https://arxiv.org/abs/2205.10287.
        """
        times = self.batch_size / (self.reference_batch_size or self.batch_size)
        return self.learning_rate * self.rate_times(times)

    def steps_over(self, rows: int) -> int:
        """Optimiser steps on so many rows; 0.07 epochs of 100 are 7, though the float is a little more."""
        return self.steps or max(1, ceil(Fraction(str(self.epochs)) * rows / self.batch_size))

    def rate_times(self, batch_times: float) -> float:
        """What the learning rate is multiplied by for a batch of so many times the rows."""
        powers = {"linear": 1.0, "sqrt": 0.5}
        return float(batch_times ** powers.get(self.learning_rate_scaling, 0.0))

    def recomputes(self, block: int) -> bool:
        """Whether the backward pass computes the block of that number once more."""
        return self.activation_checkpointing and block % self.checkpoint_blocks == 0

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
