"""Where a stage trains: its fields, and the processes and the device it runs on. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from compresskit.training.fields import TrainingFields

COLLECTIVE_S = 1800.0
"""Seconds that ranks wait for one that does not come."""


NOTES = "COMPRESSKIT_NOTES"
"""Environment variable of processes that we start: the directory in which they note why they failed."""
PARENT = "COMPRESSKIT_PARENT"
"""Environment variable of the same processes: the process that started them, without which they end."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a rule looks at: the fields, and where they will run.

    Attributes:
        fields: of the stage.
        processes: that take part; those of an existing launch where there is one.
        device: ``cpu`` or ``cuda``.
        devices: accelerators that this machine can give to processes of our own; 0 where that is no limit.
        cores: of the CPU, in the same way.
    """

    fields: TrainingFields
    processes: int
    device: str
    devices: int = 0
    cores: int = 0

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
        return self.strategy in ("fsdp", "tp") or (
            self.strategy == "deepspeed" and self.fields.zero_stage == 3
        )

    @property
    def parameter_parts(self) -> int:
        """Parts in which the parameters lie between steps, each process having one."""
        if self.fields.pipeline_stages > 1:
            return self.fields.pipeline_stages
        if self.strategy == "deepspeed":
            return self.processes if self.fields.zero_stage == 3 else 1
        if self.strategy == "tp":
            return self.fields.tensor_parallel
        return max(1, self.processes // self.fields.replicas) if self.strategy == "fsdp" else 1

    @property
    def on_mesh(self) -> bool:
        """Whether ranks do more than one thing with the model, or split its layers."""
        return self.strategy == "tp" or self.fields.replicas > 1 or self.fields.tensor_parallel > 1

    @property
    def data_ranks(self) -> int:
        """Ranks, or groups of them, that see rows of their own."""
        return max(1, self.processes // self._together)

    def data_rank(self, rank: int) -> int:
        """Which of them ``rank`` is, or belongs to."""
        return rank // self._together

    def computes_loss(self, rank: int) -> bool:
        """Whether ``rank`` does, and so asks a teacher; of a pipeline the one with the last stage."""
        width = max(1, self.fields.pipeline_stages)
        return rank % width == width - 1

    @property
    def _together(self) -> int:
        """Ranks that see the same rows: of split layers, or the stages of one pipeline."""
        return self.fields.tensor_parallel * max(1, self.fields.pipeline_stages)

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass of one process; by itself a pipeline has as many passes as stages."""
        passes = self.data_ranks * max(1, self.fields.pipeline_stages)
        return self.fields.micro_batch_size or max(1, self.fields.batch_size // passes)

    @property
    def passes(self) -> int:
        """Forward passes of one process per optimiser step."""
        return self.fields.batch_size // max(1, self.micro_batch_size * self.data_ranks)


def launched_processes() -> int | None:
    """The processes of the torchrun or accelerate launch this process belongs to; None outside of one."""
    if "LOCAL_RANK" not in os.environ or "RANK" not in os.environ:
        return None
    return int(os.environ.get("WORLD_SIZE", "1"))


def passes_per_step(fields: TrainingFields) -> int:
    """Forward passes of one process per optimiser step, here and now."""
    return Setting(fields, launched_processes() or fields.processes, "cpu").passes


def this_rank() -> int:
    """The rank of this process in its launch; outside of one 0, the rank that writes and tells."""
    return int(os.environ.get("RANK", "0")) if launched_processes() is not None else 0
