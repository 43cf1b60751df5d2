"""Pipelines: each rank has some blocks of the model, and micro-batches pass through all of them.

Schedules are those of torch.distributed.pipelining: GPipe (Huang et al., 2018, arXiv 1811.06965), 1F1B
(Narayanan et al., 2019, "PipeDream", arXiv 1806.03377) and interleaved 1F1B with two stages a rank (Narayanan
et al., 2021, arXiv 2104.04473). A schedule takes a step's forward and backward passes all at once, so to the
Trainer a step has one batch. The objective is computed in the last stage with the head's own weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from compresskit.errors import EngineError, Fault, PlanError
from compresskit.kernels.dispatch import used
from compresskit.training.driver.balance import balanced_stages
from compresskit.training.driver.own_state import OwnState
from compresskit.training.driver.place import Place, Placed, Staged
from compresskit.training.driver.stage import (
    Stage,
    keep_only,
    layout_of,
    owners,
    require_stages_compose,
    shared_by_ends,
)
from compresskit.training.features import Featured
from compresskit.training.finite import bad_gradient, first_named, not_finite, on_every_rank
from compresskit.training.objective import LOSS, Objective, Remote
from compresskit.training.order import Ordered, supervised
from compresskit.training.redirect import redirected
from compresskit.training.rules.pipeline import STAGES_A_RANK
from compresskit.training.sentences import on_sentences
from compresskit.training.setting import Setting
from compresskit.training.trainer import summed

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}
PASSED = ("input_ids", "position_ids", "labels")
"""What every stage sees of a batch."""


class PipelineTrainer(OwnState):
    """The trainer of ``pipeline_stages`` above 1; takes what StageTrainer takes, and the objective.

    The model keeps the blocks of this rank; the others are stand-ins from now on.

    Raises:
        PlanError: the model, or what is to be learnt, cannot be divided into stages.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        objective: Objective,
        setting: Setting,
        rows: Ordered,
        **others: Any,
    ) -> None:
        _require_divisible(objective, others)
        fields = setting.fields
        args.gradient_accumulation_steps = 1  # the schedule passes all micro-batches of a step
        self._place = place = Place(args.process_index, setting.processes, fields.pipeline_stages)
        layout, chunks = layout_of(model), STAGES_A_RANK.get(fields.pipeline_schedule, 1)
        costs, head = layout.costs(model)
        stages = balanced_stages(costs, place.width * chunks, last=head)
        require_stages_compose(model, layout, stages)
        whole = owners(model, layout, stages)
        self._tied = shared_by_ends(model, whole, len(stages) - 1)
        placed = _placed(model, whole, place.width)
        mine = range(place.at, len(stages), place.width)
        self._stages = [Stage(model, layout, i, stages, fields.precision) for i in mine]
        known = {name for name, _ in model.named_modules()}
        blocks = [block for i in mine for block in stages[i]]
        first, last = self._stages[0].is_first, self._stages[-1].is_last
        keep_only(model, layout, blocks, is_first=first, is_last=last)
        if not first:
            for name in layout.before:  # its result is dropped here
                model.get_submodule(name).requires_grad_(False)
        modules = dict(model.named_modules())
        others["held"] = tuple(
            n for n in others["held"] if n not in known or hasattr(modules.get(n), "weight")
        )
        self._tokens = 1
        self._part_names: list[str] | None = None
        self._width = layout.width
        super().__init__(model, args, setting=setting, rows=rows, **others)
        self._objective, self._rows = objective, rows
        self.access = Staged(placed, place, args.device)
        self._pipe = nn.ModuleList(self._stages).to(args.device)
        self._micro_batches = fields.batch_size // (place.pipelines * setting.micro_batch_size)
        self._schedule: Any = None

    @property
    def engine(self) -> str:
        """See :attr:`StageTrainer.engine`; by the schedule and the groups that are there."""
        kind = next(name for name, made in SCHEDULES.items() if type(self._schedule) is made)
        width = dist.get_world_size(self._place.group("pipeline"))
        several = f", {self._place.pipelines} side by side" if self._place.pipelines > 1 else ""
        return f"pipeline {width} x {kind}{several}"

    def require_engine(self) -> None:
        """See :meth:`StageTrainer.require_engine`."""
        fields = self._setting.fields
        asked = f"pipeline {fields.pipeline_stages} x {fields.pipeline_schedule}"
        if not self.engine.startswith(asked):
            cure = "Choose another pipeline_schedule."
            raise EngineError(Fault("pipeline_schedule", asked, self.engine, cure))

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The stages of this rank: what Accelerate has no wrapper for."""
        return self._pipe

    def when_prepared(self) -> None:
        """Also make the schedule, of states whose shapes are known."""
        if self._stages[-1].is_last:
            skeleton, precision = self._stages[-1].model, self._setting.fields.precision
            self.resources.enter_context(redirected(skeleton, self._objective, precision=precision))
            self._stages[-1].ends = self._ended
        rows, length = self._setting.micro_batch_size, len(self._rows[0]["input_ids"])
        states = torch.empty(rows, length, self._width, device="meta", requires_grad=True)
        ids, scalar = (
            torch.empty(rows, length, dtype=torch.int64, device="meta"),
            torch.empty((), device="meta"),
        )
        made = [
            PipelineStage(
                stage,
                self._place.at + i * self._place.width,
                self._place.width * len(self._stages),
                self.args.device,
                input_args=(ids if stage.is_first else states,),
                output_args=(scalar if stage.is_last else states,),
                group=self._place.group("pipeline"),
            )
            for i, stage in enumerate(self._stages)
        ]
        schedule = SCHEDULES[self._setting.fields.pipeline_schedule]
        several = schedule is ScheduleInterleaved1F1B
        self._schedule = schedule(
            made if several else made[0], self._micro_batches, loss_fn=self._per_token, scale_grads=False
        )
        super().when_prepared()

    def _per_token(self, total: Tensor, _: Tensor) -> Tensor:
        """A micro-batch's part of the mean over the supervised tokens of the step."""
        return total / self._tokens

    def _ended(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a batch in the last stage."""
        sums = self._sums(self._stages[-1].model, batch)
        if self._stages[-1].training:
            for part in sums.keys() - {LOSS}:
                self._parts[part] = self._parts.get(part, 0) + sums[part].detach() / self._tokens
        return sums[LOSS]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A batch a step: all rows of this pipeline, the same on each of its ranks."""
        place, setting = self._place, self._setting
        return DataLoader(
            self._rows,
            batch_sampler=cast(Any, StepRows(self._rows, setting, place.pipeline, place.pipelines)),
            collate_fn=cast(Any, self._collate),
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Supervised tokens of one optimiser step; the first rank of each pipeline counts them."""
        count = 0 if self._place.at else sum(map(supervised, batch_samples))
        return summed(torch.tensor(count, device=device))

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """All forward and backward passes of a step; the gradient is whole on every rank afterwards.

        Returns:
            The loss times the number of ranks in a last stage and 0 elsewhere: the mean over ranks is logged.

        Raises:
            NumericError: the loss is not finite; all ranks raise it.
        """
        self._mode(training=True)
        batch, place, losses = self._prepare_inputs(inputs), self._place, list[Tensor]()
        self._tokens = max(int(num_items_in_batch or 0), 1)
        fed = {name: batch[name] for name in PASSED}
        first, last = self._stages[0].is_first, self._stages[-1].is_last
        self._schedule.step(
            *((fed["input_ids"],) if first else ()),
            **({"target": fed["labels"], "losses": losses} if last else {}),
            return_outputs=False,
            **fed,
        )
        loss = torch.stack(losses).sum().detach() if last else torch.zeros((), device=self.args.device)
        if on_every_rank(not bool(loss.isfinite()), loss.device):
            spoilt = next((n for n, p in self._trained().items() if not p.isfinite().all()), None)
            layer = first_named(spoilt and f"{spoilt.rpartition('.')[0]}, whose weight is not finite")
            raise not_finite("loss", self.state.global_step + 1, layer)
        if place.is_end:
            place.summed([_gradient(p) for p in self._tied], "ends")
        if place.pipelines > 1:
            place.summed([_gradient(p) for p in self._trained().values()], "alike")
        return loss * place.ranks

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip by the norm over all stages, a weight of two of them once."""
        own = list(self._trained().values())
        tied = set(self._tied) if self._place.at else set()
        squares = torch.zeros((), dtype=torch.float64, device=self.args.device)
        for parameter in own:
            if parameter.grad is not None and parameter not in tied:
                squares += torch.linalg.vector_norm(parameter.grad).double().square()
        dist.all_reduce(squares, group=self._place.group("pipeline"))
        norm = squares.sqrt().float()
        if not norm.isfinite():
            layer = first_named(bad_gradient(cast(nn.Module, self.model).named_parameters()))
            raise not_finite("gradient", self.state.global_step + 1, layer)
        torch.nn.utils.clip_grads_with_norm_(own, float(self.args.max_grad_norm), norm)
        return norm

    def _parts_of_step(self) -> dict[str, float]:
        """See :meth:`StageTrainer._parts_of_step`; a last stage alone knows what there is."""
        if self._part_names is None:
            told: list[Any] = [None] * self._place.ranks
            dist.all_gather_object(told, (sorted(self._parts), used()))
            self._part_names = sorted({name for names, _ in told for name in names})
            if self._watch is not None:
                kernels = {op: how for _, ops in told for op, how in ops.items()}
                self._watch.log.write({"step": self.state.global_step, "kernels": kernels})
        zero = torch.zeros((), device=self.args.device)
        self._parts = {name: self._parts.get(name, zero) for name in self._part_names}
        return super()._parts_of_step()

    def _mode(self, *, training: bool) -> None:
        """See :meth:`StageTrainer._mode`: of the stages, and of the model that they were taken from."""
        for module in (self._pipe, cast(nn.Module, self.model)):
            module.train(training)

    def _loss_of(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """See :meth:`StageTrainer._loss_of`: forward passes alone, one stage after another."""
        place, made = self._place, None
        batch = {name: inputs[name] for name in PASSED}
        head = place.rank - place.at
        for stage in self._stages:
            given = batch["input_ids"]
            if not stage.is_first:
                given = torch.empty(*given.shape, self._width, device=self.args.device)
                dist.recv(given, head + (place.at - 1) % place.width, group=place.group("pipeline"))
            made = stage(given, **batch)
            if not stage.is_last:
                to = head + (place.at + 1) % place.width
                dist.send(made, to, group=place.group("pipeline"))
                made = None
        return made


class StepRows:
    """The places of the rows of each step that one pipeline passes: micro-batches go to pipelines in turn.

    Args:
        rows: of the whole run.
        setting: of the run.
        pipeline, pipelines: whose they are.
    """

    def __init__(self, rows: Ordered, setting: Setting, pipeline: int, pipelines: int) -> None:
        self._steps, self._batch_size = len(rows) // setting.fields.batch_size, setting.fields.batch_size
        size = setting.micro_batch_size
        self._own = [i for i in range(self._batch_size) if i // size % pipelines == pipeline]

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self._steps):
            yield [step * self._batch_size + i for i in self._own]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Its gradient, zeros where a step had none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _placed(model: nn.Module, stages: Mapping[str, int], width: int) -> dict[str, Placed]:
    """Where each tensor of the state dict is, and what it is like."""
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    return {
        name: Placed(stages[name] % width, tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, tensor in state.items()
    }


def _require_divisible(objective: Objective, others: Mapping[str, Any]) -> None:
    """PlanError for what needs more of the model in one place than a stage is."""
    faults = []
    if on_sentences(objective) is not None or isinstance(objective, Featured):
        faults.append(("an objective on next tokens alone", type(objective).__name__))
    if isinstance(others.get("teacher"), Remote):
        faults.append(("a teacher in the process of the last stage", "one elsewhere"))
    for name in ("zeroing", "on_policy"):
        if others.get(name) is not None:
            faults.append((f"no {name}", name))
    if faults:
        cure = "Set pipeline_stages to 1, or leave this out."
        raise PlanError(*(Fault("pipeline_stages", expected, got, cure) for expected, got in faults))
