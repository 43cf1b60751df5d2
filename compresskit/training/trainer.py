"""The one Trainer: an objective inside the wrapped forward, losses per supervised token, all finite."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from compresskit.training import checkpoint
from compresskit.training.access import ParamAccess
from compresskit.training.asking import Asking, continuing
from compresskit.training.backoff import Backoff
from compresskit.training.best import Best
from compresskit.training.deepspeed import require_offload
from compresskit.training.engine import require_engine, running_engine
from compresskit.training.evaluation import Share, evaluation_at, is_owed, lowest_evaluation, shown_progress
from compresskit.training.finite import bad_gradient, culprit, first_named, not_finite, on_every_rank
from compresskit.training.hold import hold_zeros
from compresskit.training.kept import KeptTrainer
from compresskit.training.mesh.rows import Items
from compresskit.training.objective import LOSS, TeacherProvider
from compresskit.training.optimizing import bare, optimizer_of, settle_weights
from compresskit.training.order import FED, Collate, Rows, stack, supervised
from compresskit.training.overlap import prefetch_blocks, share_buckets
from compresskit.training.rollout import OnPolicy, Student, eos_ids, on_policy_batches, tokens_of
from compresskit.training.setting import Setting
from compresskit.training.watch import Watch
from compresskit.training.zeroing import Zeroing, change_zeros


class _Moments(TrainerCallback):
    """Tells the trainer when the engine has prepared the model, and when a step begins and is done."""

    def __init__(self, trainer: StageTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.when_prepared()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.when_stepping()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer.when_stepped()


class StageTrainer(KeptTrainer):
    """Transformers' Trainer for every stage that trains.

    Args:
        model: bare; its forward is redirected to the objective already.
        args: from ``compresskit.training.arguments``.
        rows: in the order of training.
        validation: rows to evaluate on, or None.
        teacher: of the objective, or None.
        setting: what was asked for.
        held: layers whose zeros stay.
        zeroing: what changes zeros from step to step, or None.
        access: to the engine's parameters.
        collate: rows to a batch.
        watch: of the main process.
        identity: which run checkpoints belong to.
        evaluates_first: whether to evaluate before the first step too.
        best: where the weights of the best evaluation are kept, or None.
        on_policy: how much is learnt from the model's own text, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        rows: Items,
        validation: Rows | None,
        teacher: TeacherProvider | None,
        setting: Setting,
        held: tuple[str, ...],
        zeroing: Zeroing | None,
        access: ParamAccess,
        collate: Collate = stack,
        watch: Watch | None,
        identity: str,
        evaluates_first: bool = False,
        best: Best | None = None,
        on_policy: OnPolicy | None = None,
    ) -> None:
        self._setting, self._validation = setting, validation
        self._asking = Asking(teacher, args.device, self._keep) if teacher is not None else None
        self._held, self._zeroing = held, zeroing
        self._watch, self._identity = watch, identity
        self._collate = collate
        self._parts: dict[str, Tensor] = {}
        self._own_tokens: int | None = None
        self._evaluates_first, self._best, self._on_policy = evaluates_first, best, on_policy
        self.access = access
        adapts = setting.fields.adapt_batch == "memory"
        self.backoff = Backoff(setting.micro_batch_size, args.device) if adapts else None
        self.resources = ExitStack()
        super().__init__(
            model=model, args=args, train_dataset=rows, eval_dataset=validation, data_collator=collate
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Moments(self))
        # compute_loss divides by the tokens of the whole step, so Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def create_accelerator_and_postprocess(self) -> None:
        """Also make the fp16 loss scaler, which Accelerate leaves out on a CPU."""
        super().create_accelerator_and_postprocess()
        share_buckets(self.accelerator)
        if self._setting.fields.precision == "fp16":
            self.accelerator.scaler = torch.amp.GradScaler(self._setting.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Of the table; without the groups that few parameters leave empty, which FSDP cannot restore."""
        whole, fields = cast(nn.Module, model or self.model), self._setting.fields
        decayed, warmup = self.get_decay_parameter_names(whole), int(self.args.warmup_steps)
        rate = self.args.learning_rate
        self.optimizer_cls_and_kwargs = optimizer_of(fields, whole, decayed, rate=rate, warmup_steps=warmup)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        # A fused one would be asked to step where a gradient overflowed too, so that none could be counted.
        bare(made)._step_supports_amp_scaling = False
        groups = bare(made).param_groups
        groups[:] = [group for group in groups if group["params"]]
        return made

    @property
    def engine(self) -> str:
        """What runs, by what the objects are."""
        return running_engine(self.model_wrapped, cast(nn.Module, self.model))

    def require_engine(self) -> None:
        """EngineError unless what runs is what was asked for."""
        require_engine(self._setting, self.model_wrapped, cast(nn.Module, self.model))

    @property
    def telling(self) -> AbstractContextManager[object]:
        """While it lasts the main process tells how far it is; others tell nothing."""
        return self._watch or nullcontext()

    def when_prepared(self) -> None:
        """Check the engine and hold the zeros, until ``resources`` is closed."""
        model = cast(nn.Module, self.model)
        self.require_engine()
        require_offload(self._setting, self.model_wrapped)
        prefetch_blocks(self._setting, model)
        self.resources.enter_context(hold_zeros(model, self._held, self.access))
        if self.state.global_step == 0:
            self.when_stepped()  # some begin with zeros; a restart has them already
            if self._evaluates_first:
                self.evaluate()
        elif is_owed(self.state.log_history, self.state.global_step, self._setting.fields.eval_every):
            self.evaluate()

    def when_stepping(self) -> None:
        """Collect gradients in a step whose change of zeros looks at them."""
        if self._zeroing is not None:
            step, steps = self.state.global_step + 1, self.state.max_steps
            self.access.collecting = self._zeroing.needs_gradient(step, steps)

    def when_stepped(self) -> None:
        """Change the zeros that are due after this step, before it is evaluated or saved."""
        step = self.state.global_step
        if self._zeroing is not None and self._zeroing.due(step, self.state.max_steps):
            if self.access.collecting and self._overflowed():
                self.access.drop()
                return
            model, optimizer = cast(nn.Module, self.model), bare(self.optimizer)
            change_zeros(model, self._zeroing, self.access, optimizer, step, self.state.max_steps)

    def _overflowed(self) -> bool:
        """Whether the optimiser skipped the step just taken, on any rank; every rank asks."""
        return on_every_rank(bool(self.accelerator.optimizer_step_was_skipped), self.args.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(cast(Sized, train_dataset or self.train_dataset))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of one step and their supervised tokens; of one that is on-policy the model's own."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._own_tokens = None
        policy, step, seed = self._on_policy, self.state.global_step, int(self.args.seed)
        if policy is not None and policy.is_due(step, seed):
            model = cast(nn.Module, self.model)
            student = Student(model, self.model_wrapped, eos_ids(model), self._setting.fields.precision)
            rank = self._setting.data_rank(self.args.process_index)
            batches = on_policy_batches(policy, batches, student, step=step, seed=seed, rank=rank)
            tokens = self._get_num_items_in_batch(batches, device)
            self._own_tokens = int(self._over_rows(torch.tensor(tokens_of(batches), device=device)))
        return batches if self._asking is None else self._asking.ahead(batches), tokens

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Supervised tokens, or sentences, of one optimiser step, over accumulation and ranks."""
        count = torch.tensor(sum(map(supervised, batch_samples)), device=device)
        return self._over_rows(count)

    def _over_rows(self, tensor: Tensor) -> Tensor:
        """Summed over ranks, once for ranks that see the same rows."""
        return summed(tensor) // self._setting.fields.tensor_parallel

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; in passes of as many rows as fit, where that is asked for."""
        take = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        return take(inputs) if self.backoff is None else self.backoff.take(inputs, take, self)

    def begin_step_again(self) -> None:
        """Forget what the step has summed up."""
        cast(nn.Module, self.model).zero_grad()
        self._parts.clear()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's part of the mean over the step's supervised tokens.

        Engines average gradients over ranks, so the part is multiplied by their number.

        Raises:
            NumericError: the loss is not finite on some rank; all ranks raise it.
        """
        compute = partial(self._sums, model, inputs)
        sums = compute() if self.backoff is None else self.backoff.agreed(compute)
        loss = sums[LOSS]
        if on_every_rank(not bool(loss.isfinite()), loss.device):
            layer = first_named(culprit(self.accelerator.unwrap_model(model), model, self._fed(inputs)))
            raise not_finite("loss", self.state.global_step + 1, layer)
        tokens = max(int(num_items_in_batch or supervised(inputs)), 1)
        for part in sums.keys() - {LOSS}:
            self._parts[part] = self._parts.get(part, 0) + sums[part].detach() / tokens
        loss = loss * (self._setting.data_ranks / tokens)
        return (loss, sums) if return_outputs else loss

    def _sums(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        sums: Mapping[str, Tensor] = model(**self._fed(inputs))
        return sums

    def _fed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the redirected forward takes: the batch, and what the teacher says about it."""
        fed: dict[str, Any] = {name: inputs[name] for name in FED if name in inputs}
        if self._asking is not None:
            signal = self._asking.about(inputs)
            model = cast(nn.Module, self.model)
            progress = self._done_fraction if model.training else 1.0
            fed["signal"] = replace(signal, progress=progress)
        return fed

    @property
    def _done_fraction(self) -> float:
        """How much of the training is behind it, from 0 to 1."""
        return self.state.global_step / self.state.max_steps

    def _keep(self) -> str:
        """Have a checkpoint of the steps that are done; where the same command continues, in a sentence."""
        step, folder = self.state.global_step, Path(str(self.args.output_dir))
        if on_every_rank(checkpoint.lacks(folder, self._identity, step), self.args.device):
            self.access.settle(cast(nn.Module, self.model))
            self._save_checkpoint(cast(nn.Module, self.model), None)
        return continuing(step, self.state.max_steps)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip; a gradient that is not finite stops the run, unless the fp16 scaler will skip the step."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(bare(self.optimizer))
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if scaler is None and norm is not None and not torch.isfinite(torch.as_tensor(float(norm))):
            layer = first_named(bad_gradient(cast(nn.Module, self.model).named_parameters()))
            raise not_finite("gradient", self.state.global_step + 1, layer)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also tell the watch."""
        super().log(logs, start_time)
        parts = self._parts_of_step() if "loss" in logs else {}
        if self._watch is not None and "loss" in logs:
            skipped = bool(self.accelerator.optimizer_step_was_skipped)
            norm = float(logs.get("grad_norm", 0.0))
            step = self.state.global_step
            rate, own = logs["learning_rate"], self._own_tokens
            self._watch.step(step, logs["loss"], rate, norm, skipped, parts, own)
        if self._watch is not None and "eval_loss" in logs:
            self._watch.evaluation(self.state.global_step, logs["eval_loss"])

    def _parts_of_step(self) -> dict[str, float]:
        """What the loss of the step just taken is made of, over all ranks; every rank asks."""
        names = sorted(self._parts)
        if not names:
            return {}
        totals = summed(torch.stack([self._parts[name].double() for name in names]))
        self._parts.clear()
        same = self._setting.fields.tensor_parallel
        return dict(zip(names, (totals / same).tolist(), strict=True))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss per supervised token over the validation rows, all ranks together."""
        if self._validation is None:
            return {}
        total, tokens = summed(self._validated()).tolist()
        metrics = {"eval_loss": total / max(tokens, 1)}
        self._offer(metrics["eval_loss"])
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validated(self) -> Tensor:
        """Summed loss and supervised tokens of this rank's share of the validation rows, float64 (2,)."""
        self._mode(training=False)
        settle_weights(self.optimizer)
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        share = Share(
            cast(Rows, self._validation),
            self._collate,
            size=self.backoff.rows if self.backoff else self._setting.micro_batch_size,
            rank=self._setting.data_rank(self.args.process_index),
            ranks=self._setting.data_ranks,
        )
        with torch.no_grad(), shown_progress(len(share), shown=self._watch is not None) as bar:
            for batch, counts in share:
                inputs = self._prepare_inputs(batch)
                loss = self._loss_of(inputs)
                if loss is not None and counts:
                    totals += torch.stack((loss.double(), loss.new_tensor(supervised(inputs)).double()))
                bar.advance()
        self._mode(training=True)
        self.access.settle(cast(nn.Module, self.model))
        return totals

    def _loss_of(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Summed loss of a batch, of which no gradient is wanted; None where another rank has it."""
        return self._sums(self.model_wrapped, inputs)[LOSS]

    def _mode(self, *, training: bool) -> None:
        """Of all modules that take part in a pass."""
        self.model_wrapped.train(training)

    def _offer(self, loss: float) -> None:
        """Keep the weights as they are if no evaluation before was better; every rank asks."""
        if self._best is not None:
            model, keep = cast(nn.Module, self.model), self.is_world_process_zero()
            gathered = partial(self.access.gather, model, keep=keep, frozen=self._best.frozen)
            self._best.offer(self.state.global_step, loss, self.lowest_evaluation(), gathered)

    def first_evaluation(self) -> float | None:
        """Validation loss before the first step of the whole run; None where it was not asked for."""
        return evaluation_at(self.state.log_history, 0)

    def lowest_evaluation(self) -> float:
        """The lowest validation loss so far, also of before a restart; infinity where there was none."""
        return lowest_evaluation(self.state.log_history)

    def last_evaluation(self) -> float | None:
        """Validation loss after the last step, evaluated now if it has not been; None without such rows."""
        settle_weights(self.optimizer)
        found = evaluation_at(self.state.log_history, self.state.global_step)
        return self.evaluate().get("eval_loss") if found is None else found


def summed(tensor: Tensor) -> Tensor:
    """``tensor``, summed over all ranks in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
