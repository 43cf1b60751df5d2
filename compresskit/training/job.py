"""A training run as plain data, so that any process can carry it out: alone, launched, or in a launch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compresskit.data.examples import ExampleRows, examples
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError, Fault, PlanError
from compresskit.modeling import ModelSource, load_tokenizer, resolve_device, text_ids
from compresskit.modeling.skeleton import load_config
from compresskit.options import freeze_options
from compresskit.registry import locate
from compresskit.training.adaptation import Adaptation, Plain
from compresskit.training.beginning import digest_of_files, words_of_teacher
from compresskit.training.fields import TrainingFields
from compresskit.training.hold import require_held
from compresskit.training.isolation import isolation_fault, model_sees_across, sees_across
from compresskit.training.launch import launch
from compresskit.training.objective import Approximate, Prepared, Prepares, TeacherProvider
from compresskit.training.order import Mixed, Numbered, Rows
from compresskit.training.outcome import TrainOutcome, outcome_from_json
from compresskit.training.rollout import OfText, OnPolicy
from compresskit.training.run import Run
from compresskit.training.sentences import on_sentences
from compresskit.training.setting import Setting, launched_processes, this_rank
from compresskit.training.surroundings import quiet_transformers

OUTCOME = "outcome.json"


@dataclass(frozen=True, slots=True)
class Part:
    """A class by name, ``module:Class``, and the keyword arguments to make it with."""

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """An instance."""
        return locate(self.target)(**self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """Everything a training process needs to know; survives JSON.

    Attributes:
        model: directory of the checkpoint to start from.
        out: directory for the result; exists.
        scratch: directory for checkpoints, the loss log and messages between processes.
        fields: of TrainingFields.
        objective: an ``Objective``.
        teacher: a ``TeacherProvider``, or None.
        adaptation: an ``Adaptation``, or None to train the plain model.
        zeroing: a ``Zeroing``, or None where no zeros are made or moved.
        data: of DataSpec.
        context_length: tokens per row.
        cache: directory of the token cache.
        validation_rows: at most so many are evaluated on; 0 for none.
        held: layers whose zeros stay.
        seed: of data order and dropout.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        trust_remote_code: whether code in the model's directory may run.
        title: of the progress line.
        evaluates_first: whether the validation loss is also measured before the first step.
        on_policy: fields of ``OnPolicy``, or None to learn from the data alone.
    """

    model: str
    out: str
    scratch: str
    fields: Mapping[str, Any]
    objective: Part
    teacher: Part | None = None
    adaptation: Part | None = None
    zeroing: Part | None = None
    data: Mapping[str, Any]
    context_length: int
    cache: str
    validation_rows: int = 256
    held: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    title: str = "Training"
    evaluates_first: bool = False
    on_policy: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """As text that :meth:`from_json` reads back to an equal job."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrainJob:
        """Inverse of :meth:`to_json`."""
        data = json.loads(text)
        for name in ("objective", "teacher", "adaptation", "zeroing"):
            data[name] = data[name] and Part(**data[name])
        # JSON made lists of tuples.
        spec, trackers = asdict(DataSpec(**data["data"])), tuple(data["fields"].get("trackers", ()))
        options = freeze_options(data["fields"].get("optimizer_options", ()))
        fields = {**data["fields"], "trackers": trackers, "optimizer_options": options}
        return cls(**data | {"data": spec, "held": tuple(data["held"]), "fields": fields})

    @property
    def training(self) -> TrainingFields:
        """The fields as the dataclass."""
        return TrainingFields(**self.fields)


def train(job: TrainJob) -> TrainOutcome:
    """Carry out ``job``: here, in processes of its own, or as one rank of the launch this process is in.

    Args:
        job: what to do. Started again after a kill it continues at the last complete checkpoint.

    Returns:
        The outcome; ``job.out`` holds a complete Hugging Face directory.

    Raises:
        PlanError, DataError, EngineError: it cannot be done as asked.
        NumericError: a loss, gradient or weight is not finite.
        WorkerError: a process died; the message ends with its traceback.
    """
    fields = job.training
    if launched_processes() is not None or (fields.processes == 1 and fields.strategy != "deepspeed"):
        return carry_out(job)
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    rows, validation, _ = _rows(job)  # fills the token cache once, before every worker would
    _prepared(job, job.teacher.make() if job.teacher else None, rows, validation)
    launch(job.to_json(), fields.processes, scratch)
    return outcome_from_json((scratch / OUTCOME).read_text(encoding="utf-8"))


def carry_out(job: TrainJob) -> TrainOutcome:
    """The part of one process: load, train, and on the main one save."""
    source = ModelSource(job.model, trust_remote_code=job.trust_remote_code)
    rows, validation, notes = _rows(job)
    teacher = job.teacher.make() if job.teacher else None
    prepared = _prepared(job, teacher, rows, validation)
    # Not of the loaded weights: an adaptation adds to them, and an engine may have them laid out otherwise.
    began = {"weights": digest_of_files(source.directory), "teacher": words_of_teacher(teacher)}
    if not Setting(job.training, launched_processes() or 1, "cpu").computes_loss(this_rank()):
        teacher = None  # it would only take memory here
    adaptation: Adaptation = job.adaptation.make() if job.adaptation else Plain()
    with quiet_transformers():
        model = adaptation.load(source)
        if teacher is not None:
            teacher.load()
            if isinstance(teacher, Approximate) and this_rank() == 0:
                notes += teacher.told(rows, resolve_device(job.device))

    objective = job.objective.make()
    if not job.data.get("cross_documents") and on_sentences(objective) is None:
        _require_isolation(model, teacher)

    def save(tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            adaptation.save(source, Path(job.out), tensors)
            made = ModelSource(job.out, trust_remote_code=job.trust_remote_code)
            require_held(made.tensor, job.held, source.tensor)

    outcome = Run(
        model,
        rows,
        fields=job.training,
        scratch=Path(job.scratch),
        objective=objective,
        teacher=teacher,
        validation=validation,
        held=job.held if adaptation.masks_gradients else (),
        zeroing=job.zeroing.make() if job.zeroing else None,
        adaptation=repr(adaptation),
        saves_frozen=adaptation.saves_frozen,
        seed=job.seed,
        device=job.device,
        save=save,
        title=job.title,
        evaluates_first=job.evaluates_first,
        on_policy=_policy(job, source),
        warnings=notes + prepared.notes,
        began=began,
    ).train()
    outcome = replace(outcome, teacher=prepared.figures)
    if this_rank() == 0:
        (Path(job.scratch) / OUTCOME).write_text(outcome.to_json(), encoding="utf-8")
    return outcome


def _policy(job: TrainJob, source: ModelSource) -> OnPolicy | None:
    """What is learnt from the student's own text, of which no id is one that no text has."""
    if job.on_policy is None:
        return None
    return OfText(**job.on_policy, text_ids=text_ids(load_tokenizer(source)))


def _prepared(
    job: TrainJob, teacher: TeacherProvider | None, rows: Rows, validation: Rows | None
) -> Prepared:
    """Have ``teacher`` get ready, if it must know the rows before."""
    if not isinstance(teacher, Prepares):
        return Prepared()
    # In given shares an epoch leaves out some rows, which a later one has.
    every: Rows = Numbered(rows) if isinstance(rows, Mixed) else rows
    known = [every] if validation is None else [every, validation]
    with quiet_transformers():
        return teacher.prepare(known, Path(job.cache), job.device)


def _require_isolation(model: nn.Module, teacher: TeacherProvider | None) -> None:
    """PlanError if documents packed into one row see each other in the model or its teacher."""
    faults = []
    if model_sees_across(model):
        faults.append(isolation_fault("model", type(model).__name__))
    if teacher is not None and (hidden := teacher.hidden) is not None and sees_across(hidden):
        faults.append(isolation_fault("teacher", "a model"))
    if faults:
        raise PlanError(*faults)


def _rows(job: TrainJob) -> tuple[Rows, Rows | None, tuple[str, ...]]:
    """Training rows, validation rows if the data has any, and what a reader should know about them."""
    spec, tokenizer = DataSpec(**job.data), load_tokenizer(job.model, trust_remote_code=job.trust_remote_code)
    size, cache = job.context_length, Path(job.cache)
    read: Any = packed
    sentences = on_sentences(job.objective.make())
    if sentences is not None:
        # The model may take fewer than it has positions: those of RoBERTa begin at 2.
        read, size = examples, min(size, tokenizer.model_max_length)
    rows = read(spec, tokenizer, split="train", context_length=size, cache=cache)
    if sentences is not None and sentences.needs_labels:
        _require_classes(job, rows, least=1)
    notes = tuple(rows.warnings)
    if not job.validation_rows or not spec.validation_fraction:
        return rows, None, notes
    try:
        held_out = read(
            spec,
            tokenizer,
            split="validation",
            context_length=size,
            cache=cache,
            rows=job.validation_rows,
        )
    except DataError as error:
        return rows, None, (*notes, f"No validation loss was measured: {error}")
    if sentences is not None and sentences.needs_labels:
        _require_classes(job, held_out, least=0)  # by chance only these may have some class
    more = (f"Validation: {note}" for note in held_out.warnings if note not in notes)
    return rows, held_out, (*notes, *more)


def _require_classes(job: TrainJob, rows: ExampleRows, *, least: int) -> None:
    """DataError unless rows have ``least`` classes or more, and the model has each of them."""
    config = load_config(Path(job.model), trust_remote_code=job.trust_remote_code)
    if not least <= rows.num_labels <= config.num_labels:
        got = f"classes up to {rows.num_labels - 1}" if rows.num_labels else "rows without a class"
        cure = "Set data.label to the column of the classes, or cross_entropy_weight to 0."
        raise DataError(Fault(job.data["source"], f"classes from 0 to {config.num_labels - 1}", got, cure))
