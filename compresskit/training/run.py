"""Train a live model on rows: what every stage that trains, and any script, ends in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compresskit.errors import DataError, Fault, PlanError
from compresskit.kernels.dispatch import forget
from compresskit.modeling import resolve_device
from compresskit.modeling.anatomy import anatomy_of
from compresskit.training import checkpoint
from compresskit.training.access import cast_like, local_bytes
from compresskit.training.agreement import require_same
from compresskit.training.arguments import CHECKPOINTS, training_arguments
from compresskit.training.beginning import began_with, words_of
from compresskit.training.best import BEST, Best
from compresskit.training.carried import BESIDE, COUNTS, HOW, Carried, carried_out, moved, refusal, words
from compresskit.training.driver.local import LocalTrainer
from compresskit.training.driver.pipeline import PipelineTrainer
from compresskit.training.driver.zenflow import ZenFlowTrainer
from compresskit.training.faults import training_faults, zero_faults
from compresskit.training.features import Featured, projecting, without_projections
from compresskit.training.fields import TrainingFields
from compresskit.training.finite import require_finite_weights
from compresskit.training.growth import GrowingTrainer, batches_at_most
from compresskit.training.mesh.access import access_under
from compresskit.training.mesh.plan import ELSE, HEADS, tensor_faults
from compresskit.training.mesh.rows import Repeated
from compresskit.training.objective import CrossEntropy, Objective, TeacherProvider
from compresskit.training.order import Collate, Ordered, Rows, collating, digest_of, mean_tokens
from compresskit.training.outcome import TrainOutcome
from compresskit.training.ranks import Ranks, accompanied
from compresskit.training.redirect import idle_in, redirected
from compresskit.training.rollout import OnPolicy
from compresskit.training.rules.asynchronous import EVERY_STEP, ZENFLOW
from compresskit.training.rules.deepspeed import config_at, learnt_of
from compresskit.training.rules.memory import NOISE
from compresskit.training.rules.shares import MEASURED
from compresskit.training.sentences import idle_warnings, on_sentences, without_gradient
from compresskit.training.setting import Setting, launched_processes
from compresskit.training.shares import SharingTrainer
from compresskit.training.surroundings import quiet_transformers, surroundings, trainable
from compresskit.training.trace import trace_steps
from compresskit.training.trackers import Trackers
from compresskit.training.trainer import StageTrainer
from compresskit.training.watch import LOSSES, LossLog, Watch, held_bytes
from compresskit.training.zeroing import Zeroing

LAST = 10
"""Steps whose mean is the final training loss."""


@dataclass(frozen=True)
class Run:
    """One training run of a live model; :meth:`train` does it.

    Attributes:
        model: a causal language model, or with a sentence objective any other; its weights are fp32 while
            it trains and have their own dtype after.
        rows: map-style data set of {"input_ids", "labels", "position_ids"}, each int64 (T,); labels are not
            shifted, -100 is not supervised. Or of sentences, as ``compresskit.data.examples`` gives them.
        fields: how to train; ``processes`` is not acted on here (see ``compresskit.training.launch``).
        scratch: directory for checkpoints and the loss log; survives a kill.
        objective: what to minimise.
        teacher: for an objective that needs one.
        validation: rows for the evaluations.
        held: layers whose zero weights stay zero.
        zeroing: what changes zeros as steps go by; those of its layers are held in between.
        adaptation: what was done to the model before, in words; another one is another run.
        saves_frozen: whether parameters that take no gradient are gathered for ``save``.
        seed: of data order and dropout.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        save: called on every rank at the end with the whole state dict in the model's own dtypes; it is
            empty except on the main process.
        title: of the progress line.
        warnings: of whoever made the rows; passed on in the outcome.
        evaluates_first: whether to evaluate before the first step too.
        on_policy: how much is learnt from the model's own text, or None.
        began: what stands for the weights to begin with and the teacher's; None has them looked at, so that
            the model must have the same ones at each start.
    """

    model: nn.Module
    rows: Rows
    _: KW_ONLY
    fields: TrainingFields
    scratch: Path
    objective: Objective = field(default_factory=CrossEntropy)
    teacher: TeacherProvider | None = None
    validation: Rows | None = None
    held: tuple[str, ...] = ()
    zeroing: Zeroing | None = None
    adaptation: str = ""
    saves_frozen: bool = True
    seed: int = 0
    device: str = "auto"
    save: Callable[[Mapping[str, Tensor]], None] | None = None
    title: str = "Training"
    warnings: tuple[str, ...] = ()
    evaluates_first: bool = False
    on_policy: OnPolicy | None = None
    began: Mapping[str, str] | None = None

    @cached_property
    def setting(self) -> Setting:
        """The fields, and where they will run; everything wrong with them is raised here."""
        kind = resolve_device(self.device).type
        faults = training_faults(self.fields, "training", device=kind)
        if self.held or self.zeroing:
            faults += zero_faults(self.fields, "training", changing=self.zeroing is not None)
        faults += self._split_faults() if self.fields.tensor_parallel > 1 else []
        if faults:
            raise PlanError(*faults)
        if not len(self.rows):
            raise DataError(Fault("training data", "at least one row", "none", "Give more text."))
        if self.fields.keep_best and self.validation is None:
            cure = "Give data with a validation split or a validation_fraction, or leave keep_best out."
            raise DataError(Fault("keep_best", "validation rows", "none", cure))
        return Setting(self.fields, launched_processes() or 1, kind)

    def _split_faults(self) -> list[Fault]:
        """Why layers cannot be split, or what is learnt needs them whole."""
        ways, place = self.fields.tensor_parallel, "training.tensor_parallel"
        config: Any = self.model.config
        faults = tensor_faults(config, anatomy_of(self.model), ways, "training")
        objective = self.objective
        needs = {
            HEADS: isinstance(objective, Featured) and bool(objective.looks.attended),
            "no on_policy": self.on_policy is not None,
            "no loss on sentences": on_sentences(objective) is not None,
        }
        return faults + [Fault(place, need, str(ways), ELSE) for need, wanted in needs.items() if wanted]

    @cached_property
    def steps(self) -> int:
        """Optimiser steps; with ``epochs`` of a batch that grows there may be fewer."""
        return self.fields.steps_over(len(self.rows))

    @cached_property
    def identity(self) -> str:
        """Which run a checkpoint belongs to, however it is carried out; another one starts anew."""
        facts = {name: value for name, value in self._facts.items() if name not in (*HOW, "device")}
        facts["adaptation"] = COUNTS.sub("", self.adaptation)
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def carried(self) -> dict[str, Any]:
        """How the run is carried out; a checkpoint of another way is converted where that can be done."""
        return carried_out(self.setting, self.adaptation)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What makes this run another one than others."""
        setting = self.setting
        facts = {**asdict(self.fields), "steps": self.steps, "seed": self.seed, "rows": len(self.rows)}
        facts["data"] = digest_of(self.rows)
        config = config_at(self.fields.deepspeed_config)
        facts["deepspeed_config"] = json.dumps(config, sort_keys=True)
        facts["learnt by deepspeed_config"] = json.dumps(learnt_of(config), sort_keys=True)
        facts |= {"processes": setting.processes, "strategy": setting.strategy, "device": setting.device}
        told = {"objective": self.objective, "zeroing": self.zeroing, "on_policy": self.on_policy}
        facts |= words_of(told)
        facts |= self.began or began_with(self.model, self.teacher)
        facts |= {"adaptation": self.adaptation, "held": self.held}
        for name in ("eval_every", *BESIDE):
            facts.pop(name)
        return facts

    def train(self) -> TrainOutcome:
        """Train the model in place; started again after a kill it continues at the last complete checkpoint.

        In a torchrun or accelerate launch every rank does so with the same attributes. With ``keep_best`` the
        best weights go to ``save``, and the model keeps those of the last step; after a pipeline it has only
        the blocks of this rank.

        Returns:
            The outcome, on every rank; only the main one knows losses.

        Raises:
            PlanError: the fields do not combine; all faults together.
            DataError: there are no rows.
            EngineError: another engine runs than was asked for.
            NumericError: a loss, gradient or weight is not finite; names the step and the layer.
            CheckpointError: a checkpoint could not be written.
            WorkerError: another rank failed or was lost.
            RunError: a teacher elsewhere was lost; what was done until then is kept.
        """
        with accompanied() as ranks:
            return self._train(ranks)

    def _train(self, ranks: Ranks | None) -> TrainOutcome:
        """:meth:`train` in the company of ``ranks``."""
        setting = self.setting
        forget()
        self.scratch.mkdir(parents=True, exist_ok=True)
        start, warnings = self._start(ranks)
        done = checkpoint.step_of(start) if start else 0
        extended = projecting(self.model, self.objective)
        with (
            surroundings(setting.strategy),
            extended,
            trainable(self.model, self.fields) as dtypes,
            without_gradient(self.model, idle := self._idle()),
        ):
            trainer = self._trainer(done, idle)
            trainer.carried, trainer.before = self.carried, self._before(start)
            precision = self.fields.precision
            with redirected(self.model, self.objective, precision=precision):
                validated = _run(trainer, start)
            keep = trainer.is_world_process_zero()
            steps = given_step = trainer.state.global_step
            if self._best is None:
                tensors = trainer.access.gather(self.model, keep=keep, frozen=self.saves_frozen)
            else:
                lowest = trainer.lowest_evaluation()
                given_step, validated, tensors = self._best.read() if keep else (given_step, lowest, {})
            require_finite_weights(tensors, given_step)
            if self.save is not None:
                self.save(cast_like(without_projections(tensors), dtypes))
            engine = trainer.engine
            kept = local_bytes(trainer.access, self.model)
        log = LossLog(self.scratch / LOSSES)
        losses = log.losses() if trainer.is_world_process_zero() else [math.nan]
        return TrainOutcome(
            steps=steps,
            first_loss=losses[0],
            final_loss=sum(losses[-LAST:]) / len(losses[-LAST:]),
            validation_loss=validated,
            skipped_steps=log.skipped(),
            engine=engine,
            processes=setting.processes,
            parameter_bytes=kept,
            kernels=log.kernels(),
            resumed_from=done,
            seconds=log.seconds(),
            warnings=self.warnings
            + warnings
            + idle_warnings(idle)
            + (trainer.backoff.told if trainer.backoff else ()),
            learning_rate=self.fields.peak_rate,
            micro_batch_size=trainer.backoff.rows if trainer.backoff else setting.micro_batch_size,
            final_parts=log.parts(LAST),
            validation_loss_before=trainer.first_evaluation(),
            given_step=given_step,
            **(trainer.growth.told() if isinstance(trainer, GrowingTrainer) else {}),
            shares=trainer.divided if isinstance(trainer, SharingTrainer) else (),
        )

    def _start(self, ranks: Ranks | None) -> tuple[Path | None, tuple[str, ...]]:
        """The checkpoint to continue from, and a sentence about each that is damaged; rank 0 decides."""
        folder = self.scratch / CHECKPOINTS
        start = checkpoint.latest(folder, self.identity)
        damaged = checkpoint.damaged_after(folder, self.identity, start)
        if ranks is not None:
            facts = {f"training: {name}": str(value) for name, value in self._facts.items()}
            facts["training: scratch"] = str(self.scratch)
            require_same(ranks, f"run {self.title}", facts)
            told = json.dumps([start and start.name, damaged])
            name, damaged = json.loads(ranks.told(f"start {self.title}", told))
            start = folder / name if name else None
        after = f"step {checkpoint.step_of(start)}" if start else "the beginning"
        sentences = [
            f"{name} was cut short or damaged after it was written: training went on from {after}."
            for name in damaged
        ]
        before = self._before(start)
        if before is not None:
            sentences.append(
                f"{self.title} went on from {after} of {words(before)}, on {words(self.carried)}."
            )
        return start, tuple(sentences)

    def _before(self, start: Path | None) -> Carried | None:
        """How the run was carried out until ``start``, where other processes held it; PlanError if that
        cannot go on as asked now."""
        if start is None:
            return None
        before: Carried = checkpoint.mark_of(start)["carried"]
        place = f"{self.scratch}: a checkpoint after step {checkpoint.step_of(start)}"
        fault = refusal(before, self.carried, self.fields.optimizer, place)
        if fault is not None:
            raise PlanError(fault)
        return before if moved(before, self.carried) else None

    @cached_property
    def _best(self) -> Best | None:
        """Where the weights of the best evaluation are kept, if they are asked for."""
        return Best(self.scratch / BEST, self.saves_frozen) if self.fields.keep_best else None

    def _watch(self, done: int) -> Watch:
        """What the main process tells of the run, ``done`` steps of which are behind it."""
        fields, log = self.fields, LossLog(self.scratch / LOSSES)
        log.cut_after(done)
        if self._best is not None and not done:
            self._best.forget()
        trackers = None
        if fields.trackers:
            name = f"{self.title.lower()}-{self.identity[:8]}"
            trackers = Trackers(fields.trackers, run=name, settings=asdict(fields))
        return Watch(
            log,
            title=self.title,
            steps=self.steps,
            done=done,
            tokens_per_step=round(fields.batch_size * mean_tokens(self.rows)),
            trackers=trackers,
            memory_bytes=partial(held_bytes, self.setting.device),
        )

    @property
    def _kind(self) -> Callable[..., StageTrainer]:
        """Which trainer the fields ask for."""
        if self.fields.pipeline_stages > 1:
            return partial(PipelineTrainer, objective=self.objective)
        if self.fields.adapt_batch == NOISE:
            return GrowingTrainer
        if self.fields.shares == MEASURED:
            return SharingTrainer
        if self.fields.synchronise == ZENFLOW:
            return ZenFlowTrainer
        return StageTrainer if self.fields.synchronise == EVERY_STEP else LocalTrainer

    @cached_property
    def _collate(self) -> Collate:
        return collating(self.rows, sentences=on_sentences(self.objective) is not None)

    def _idle(self) -> tuple[str, ...]:
        """Parameters that the loss does not reach, found on two sentences; a language model has none."""
        if on_sentences(self.objective) is None:
            return ()
        batch = self._collate([self.rows[i] for i in range(min(2, len(self.rows)))])
        return idle_in(self.model, self.objective, batch, self.teacher, precision=self.fields.precision)

    def _trainer(self, done: int, idle: tuple[str, ...]) -> StageTrainer:
        """The trainer, ``done`` steps of whose work are behind it; what is ``idle`` needs no holding."""
        fields, setting = self.fields, self.setting
        arguments = training_arguments(
            setting,
            self.model,
            steps=self.steps,
            scratch=self.scratch,
            seed=self.seed,
            device=self.device,
            evaluates=self.validation is not None,
        )
        size, times = setting.micro_batch_size, fields.tensor_parallel
        ordered = Ordered(
            self.rows,
            # A step in shares may have as many more passes as a pass has rows.
            steps=batches_at_most(fields, self.steps) * (size if fields.shares == MEASURED else 1),
            batch_size=fields.batch_size,
            seed=self.seed,
            micro_batch_size=setting.micro_batch_size,
            ranks=setting.data_ranks,
        )
        rows = Repeated(ordered, micro_batch_size=size, times=times) if times > 1 else ordered
        held = (*self.held, *(self.zeroing.layers if self.zeroing else ()))
        trainer = self._kind(
            self.model,
            arguments,
            rows=rows,
            validation=self.validation,
            teacher=self.teacher,
            setting=setting,
            held=tuple(n for n in dict.fromkeys(held) if f"{n}.weight" not in idle),
            collate=self._collate,
            zeroing=self.zeroing,
            access=access_under(setting),
            watch=self._watch(done) if arguments.process_index == 0 else None,
            identity=self.identity,
            evaluates_first=self.evaluates_first,
            best=self._best,
            on_policy=self.on_policy,
        )
        trace_steps(trainer, fields.trace, self.scratch, done=done)
        return trainer


def _run(trainer: StageTrainer, start: Path | None) -> float | None:
    """Train from ``start``; returns the validation loss at the end."""
    with trainer.resources, quiet_transformers(), trainer.telling:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
        return trainer.last_evaluation()
