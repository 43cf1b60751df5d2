"""DeepSpeed's ZenFlow: the columns with the largest gradients are stepped at once, the others every n steps.

Paper: Lan et al., "ZenFlow: Enabling Stall-Free Offloading Training via Asynchronous Updates", 2025, arXiv
2505.12242. Gradients of the others are summed up on the CPU, whose Adam steps all weights every n steps; what
the device's own AdamW has made of the chosen columns in the meantime stays. So no gradient takes effect more
than n - 1 steps late, and after the last step none is owed. Biases and norms are stepped at once.

What DeepSpeed 0.19.8 does in silence, and is mended here: it lays matrices out by columns and reads them by
rows; it chooses by the gradients of other columns wherever a vector lies before a matrix; it lets the step
count of a new choice go on from that of the last, whose moments it zeroes; and columns at once have the
learning rate of the step before. Accelerate would declare each step an update of everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import Tensor, nn

from compresskit.errors import EngineError, Fault, PlanError
from compresskit.training import checkpoint
from compresskit.training.asking import continuing
from compresskit.training.rules.zenflow import shape_faults
from compresskit.training.trainer import StageTrainer

ELSE = "Use synchronise every_step."
LATE = "late"
"""Key of the entry in the trainer's log that tells of the first step which put gradients off."""


class ZenFlowTrainer(StageTrainer):
    """The trainer of ``synchronise: zenflow``; takes what StageTrainer takes.

    Raises:
        PlanError: zeros are moved while it trains, it learns from the model's own text, or a parameter is
            neither a vector nor a matrix of several rows.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        if faults := shape_faults(shapes, "training"):
            raise PlanError(*faults)
        for name in ("zeroing", "on_policy"):
            if kwargs.get(name) is not None:
                raise PlanError(Fault("synchronise", f"every_step beside {name}", "zenflow", ELSE))
        super().__init__(model, *args, **kwargs)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        named = cast(nn.Module, self.model).named_parameters()
        return ((name, p) for name, p in named if p.requires_grad)

    @torch.no_grad()
    def _make_contiguous(self) -> None:
        """Weights lie by columns in DeepSpeed's buffers until the training is over."""
        for _, parameter in self._trained():
            parameter.data = parameter.data.contiguous()

    @property
    def engine(self) -> str:
        """See :attr:`StageTrainer.engine`; with what was late in fact."""
        every = self._setting.fields.synchronise_every
        return f"{super().engine}, zenflow every {every}" if self._was_late else super().engine

    @property
    def _was_late(self) -> bool:
        """Whether gradients were put off in any step, also before a restart."""
        return any(LATE in entry for entry in self.state.log_history)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """What stands for those that DeepSpeed makes, by the section ``optimizer`` of its configuration."""
        return cast(torch.optim.Optimizer, self.optimizer)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Also EngineError unless the engine took the weights over as they are."""
        self.resources.enter_context(_mended())
        self.resources.callback(self._make_contiguous)
        before = [_sums(p) for _, p in self._trained()]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        now = [_sums(p) for _, p in self._trained()]
        if resume_from_checkpoint is None and not all(map(torch.allclose, now, before)):
            cure = "Use another version of deepspeed, or synchronise every_step."
            raise EngineError(Fault("synchronise zenflow", "weights as before", "others", cure))
        return prepared

    def when_prepared(self) -> None:
        """Leave the boundaries to ZenFlow; a restart begins with a new choice, as the run went on with."""
        self.accelerator.deepspeed_engine_wrapped = _Steps(self)
        zero: Any = cast(Any, self.model_wrapped).optimizer
        zero.micro_step = self.state.global_step - 1
        super().when_prepared()

    def when_stepping(self) -> None:
        """The learning rate of this step also for the chosen columns, which had that of the last."""
        zero: Any = cast(Any, self.model_wrapped).optimizer
        zero._sync_selective_optimizer_lr()
        super().when_stepping()

    def stepped(self, *, late: bool) -> None:
        """After each step; ``late`` where most gradients were put off: checkpoints have the log of that."""
        if late and not self._was_late:
            self.state.log_history.append({LATE: 1.0, "step": self.state.global_step + 1})

    def _keep(self) -> str:
        """Where the last checkpoint is: between them updates are owed, which none holds."""
        last = checkpoint.latest(Path(str(self.args.output_dir)), self._identity)
        return continuing(checkpoint.step_of(last) if last else 0, self.state.max_steps)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """With what was stepped on the device, as the next choice would begin with anyway."""
        cast(Any, self.model_wrapped).optimizer.sync_fp32_param_from_gpu()
        super()._save_checkpoint(model, trial)


class _Steps(DeepSpeedEngineWrapper):  # type: ignore[misc]
    """A backward pass and ZenFlow's step; after the last one of the run nothing is owed."""

    def __init__(self, trainer: ZenFlowTrainer) -> None:
        super().__init__(trainer.model_wrapped)
        self._trainer = trainer

    def backward(self, loss: Tensor, sync_gradients: bool = True, **_: Any) -> None:
        """The mean of gradients is stepped late, not their sum: its norm is what ``max_grad_norm`` is for."""
        state = self._trainer.state
        if state.global_step + 1 == state.max_steps:
            self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(loss)
        self.engine.step()
        self._trainer.stepped(late=not self.engine.was_step_applied())


@contextmanager
def _mended() -> Iterator[None]:
    """While it lasts DeepSpeed does what its ZenFlow is meant to; see the top of this file."""
    from deepspeed.ops.adam import ZenFlowSelectiveAdamW
    from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizer

    choose = ZenFlowZeroOptimizer.update_selected_channels

    def choose_by_own(zero: Any, gradients: Tensor, total: int, dtype: torch.dtype) -> None:
        choose(zero, _of_matrices(zero, gradients, dtype), total, dtype)

    with (
        patch.object(ZenFlowZeroOptimizer, "_update_model_bit16_weights", _lay_out),
        patch.object(ZenFlowZeroOptimizer, "update_selected_channels", choose_by_own),
        patch.object(ZenFlowSelectiveAdamW, "clear_selected_mv", lambda self: self.state.clear()),
    ):
        yield


def _of_matrices(zero: Any, gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a flat bucket what belongs to matrices: where one begins, vectors before it are not counted."""
    parts, start = [gradients[:0]], 0
    for group, index, _ in zero.ipg_buckets[dtype].params:
        parameter = zero.bit16_groups[group][index]
        if parameter.dim() == 2:
            parts.append(gradients.narrow(0, start, parameter.numel()))
        start += parameter.numel()
    return torch.cat(parts)


def _lay_out(zero: Any, group: int) -> None:
    """Make each weight a view of DeepSpeed's flat buffer, in which matrices lie column by column."""
    flat = zero.bit16_groups_flat[group]
    metas, starts = zero.round_robin_bit16_meta[group], zero.round_robin_bit16_offsets[group]
    for parameter, meta, start in zip(zero.round_robin_bit16_groups[group], metas, starts, strict=True):
        own = flat.narrow(0, start, meta.numel())
        parameter.data = own.view(meta.shape[::-1]).t() if meta.dim() == 2 else own.view(meta.shape)


def _sums(parameter: nn.Parameter) -> Tensor:
    """Of the last dimension; other weights in the same places have others."""
    return parameter.detach().double().sum(-1).cpu()
