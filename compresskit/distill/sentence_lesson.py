"""What a stage learns of whole sentences from a teacher: checks of its fields, and the parts of a job.

For models without a next-token head. Whether they read sentences as they are asked to, and how wide what they
make is, is found by running skeletons.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compresskit.data import check
from compresskit.distill import LOSSES, SENTENCE_LOSSES
from compresskit.distill.feature_outlook import compared, feature_bytes, feature_faults, featured
from compresskit.distill.features import looks_of
from compresskit.distill.lesson import mix_faults
from compresskit.distill.sentence_base import POOLINGS
from compresskit.distill.vocabulary import teacher_fault, vocabulary_faults, vocabulary_of
from compresskit.errors import Fault, InputError, PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.modeling.skeleton import skeleton_of
from compresskit.options import Choice, choice_faults, choices_of
from compresskit.training.job import Part
from compresskit.training.lesson import NO_ALIGNMENT, REPLICATE
from compresskit.training.sentences import LOGITS, STATES, read_by
from compresskit.training.setting import Setting, launched_processes

if TYPE_CHECKING:
    from compresskit.stage import Outlook, StageContext
    from compresskit.training.lesson import Taught

REPLICA = "compresskit.distill.sentence_teacher:SentenceReplica"
OBJECTIVE = "compresskit.distill.sentences:SentenceLosses"
MASK = "attention_mask"
WHAT = {STATES: "a model that makes states of token ids and a mask", LOGITS: "a classifier of sentences"}


class SentencesLesson:
    """See :class:`compresskit.training.lesson.Lesson`."""

    @staticmethod
    def faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
        """What is wrong with the losses, the data and the teacher, for a student such as ``model``."""
        faults = _loss_faults(stage, f"{where}.loss")
        faults += _number_faults(stage, where)
        if model.anatomy.is_causal and model.anatomy.head is not None:
            got = f"{type(model.config).__name__}, which has a next-token head"
            cure = f"Choose a loss on next tokens: {', '.join(LOSSES)}."
            faults.append(Fault(f"{where}.loss", "a model that reads sentences whole", got, cure))
        if stage.teacher_placement.method != REPLICATE:
            got, cure = stage.teacher_placement.method, "Leave teacher_placement out."
            faults.append(Fault(f"{where}.teacher_placement", REPLICATE, got, cure))
        faults += _idle_faults(stage, where)
        data = stage.data or model.data
        if not data.examples:
            faults += check(replace(data, examples=True), f"{where}.data, read as sentences")
        trust = model.trust_remote_code
        try:
            teacher = open_model(stage.teacher or str(model.original), trust_remote_code=trust)
        except InputError as error:
            return faults + [teacher_fault(f"{where}.teacher", fault) for fault in error.faults]
        faults += feature_faults(stage, model, f"{where}.features")
        if faults:
            return faults
        rows = vocabulary_of(model.config)
        faults += vocabulary_faults(
            model.tokenizer, rows, teacher, f"{where}.teacher", trust_remote_code=trust
        )
        places = ((model.config, model.original), (teacher.config, teacher.directory))
        return faults + _model_faults(stage, places, where, trust)

    @staticmethod
    def held_bytes(stage: Taught, model: Outlook) -> int:
        """Of the teacher's weights, which every process holds, and of what a feature loss keeps."""
        teacher = open_model(stage.teacher or str(model.original), trust_remote_code=model.trust_remote_code)
        return teacher.bytes + feature_bytes(stage, model)

    @staticmethod
    def before_bytes(stage: Taught, model: Outlook) -> int:
        """None."""
        return 0

    @staticmethod
    def notes(stage: Taught, model: Outlook) -> tuple[str, ...]:
        """None: such a teacher lives in every process, and there is no choice to weigh."""
        return ()

    @staticmethod
    def parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
        """What to minimise, and where the teacher's signal comes from.

        Raises:
            PlanError: the teacher's token ids are others, or it does not make what is compared.
        """
        trust, rows = context.trust_remote_code, vocabulary_of(model.config)
        source = open_model(stage.teacher or str(context.original), trust_remote_code=trust)
        places = ((model.config, model.directory), (source.config, source.directory))
        faults = vocabulary_faults(model.directory, rows, source, "teacher", trust_remote_code=trust)
        faults += _model_faults(stage, places, stage.kind, trust)
        if faults:
            raise PlanError(*faults)
        reads = _reads(stage)
        widths = [_width(*place, reads, trust) for place in places]
        projected = widths[0] != widths[1] and _needs_one_width(stage)
        losses = [(choice.method, dict(choice.options)) for choice in choices_of(stage.loss)]
        mixed = {"temperature": stage.temperature, "cross_entropy_weight": stage.cross_entropy_weight}
        objective = Part(OBJECTIVE, {"losses": losses, **mixed, "widths": widths if projected else None})
        teacher: dict[str, Any] = {"directory": str(source.directory), "reads": reads}
        teacher["trust_remote_code"] = trust
        if stage.features is not None:
            objective = featured(stage, objective, model, source)
            looks = looks_of(compared(stage, model, source), 1)
            teacher |= {"blocks": looks.outputs, "attended": looks.attended}
        return objective, Part(REPLICA, teacher)


def _reads(stage: Taught) -> str:
    return SENTENCE_LOSSES[choices_of(stage.loss)[0].method].reads


def _needs_one_width(stage: Taught) -> bool:
    return any(SENTENCE_LOSSES[choice.method].one_width for choice in choices_of(stage.loss))


def _loss_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the losses themselves; one at least is of the table."""
    faults, made = [], []
    choices = choices_of(stage.loss)
    for i, choice in enumerate(choices):
        place = f"{where}[{i}]" if len(choices) > 1 else where
        if choice.method in LOSSES:
            got = f"{choice.method}, a loss on next tokens"
            cure = "Leave one of them out: a model either has a next-token head or not."
            faults.append(Fault(place, "only losses on sentences", got, cure))
            continue
        faults += choice_faults(choice, SENTENCE_LOSSES, where=place) or _field_faults(choice, stage, place)
        if choice.method in SENTENCE_LOSSES:
            made.append(SENTENCE_LOSSES[choice.method].reads)
    if len(set(made)) > 1:
        cure = "Leave one kind of them out."
        faults.append(Fault(where, "losses on embeddings, or losses on logits", "both", cure))
    return faults


def _field_faults(choice: Choice, stage: Any, where: str) -> list[Fault]:
    faults = []
    pooling = dict(choice.options).get("pooling", POOLINGS[0])
    if pooling not in POOLINGS:
        cure = "Choose one of these."
        faults.append(Fault(f"{where}.pooling", " or ".join(POOLINGS), repr(pooling), cure))
    least = SENTENCE_LOSSES[choice.method].least_sentences
    size = Setting(stage, launched_processes() or stage.processes, "cpu").micro_batch_size
    if size < least:
        cure = "Raise micro_batch_size, or batch_size."
        faults.append(Fault(where, f"at least {least} sentences in a forward pass", str(size), cure))
    return faults


def _number_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the temperature and the share of cross entropy, which only logits have."""
    faults = []
    if all(choice.method != "class_logits" for choice in choices_of(stage.loss)):
        for name, unused in (("temperature", 1.0), ("cross_entropy_weight", 0.0)):
            if (value := getattr(stage, name)) != unused:
                cure = "Leave this field out: embeddings have no probabilities."
                faults.append(Fault(f"{where}.{name}", "nothing beside such losses", str(value), cure))
        return faults
    return mix_faults(stage, where)


def _idle_faults(stage: Any, where: str) -> list[Fault]:
    """Fields that only a loss on next tokens looks at, and that were set."""
    cure = "Leave this field out."
    faults = []
    if stage.alignment.method != NO_ALIGNMENT:
        got = stage.alignment.method
        faults.append(Fault(f"{where}.alignment", "the student's tokenizer in the teacher", got, cure))
    if stage.on_policy is not None:
        got = "a model that generates none"
        faults.append(Fault(f"{where}.on_policy", "a model that generates text", got, cure))
    return faults


def _model_faults(
    stage: Taught, places: tuple[tuple[Any, Path], ...], where: str, trust: bool
) -> list[Fault]:
    """Why student and teacher, each a configuration and a directory, do not make what is compared."""
    reads, faults, widths = _reads(stage), [], []
    spots = (where, f"{where}.teacher") if stage.teacher else (where,)
    for spot, (config, directory) in zip(spots, places, strict=False):
        width = _width(config, directory, reads, trust)
        widths.append(width)
        if isinstance(width, str):
            got = f"{type(config).__name__}: {width}"
            cure = "Choose an encoder, such as BertModel." if reads == STATES else OF_CLASSES
            faults.append(Fault(spot, WHAT[reads], got, cure))
        elif reads == LOGITS and getattr(config, "problem_type", None) not in (None, ONE_CLASS):
            got, cure = str(config.problem_type), "Choose a classifier whose classes exclude each other."
            faults.append(Fault(spot, f"a classifier with problem_type {ONE_CLASS}", got, cure))
        elif reads == LOGITS and width < 2:
            faults.append(Fault(spot, "two classes or more", str(width), "Choose another classifier."))
    if not faults and reads == LOGITS and len(set(widths)) > 1:
        cure = "Give the student's configuration the teacher's num_labels, id2label and label2id."
        expected = f"as many classes as the teacher's {widths[1]}"
        faults.append(Fault(f"{where}.teacher", expected, f"{widths[0]} in the student", cure))
    return faults


ONE_CLASS = "single_label_classification"
OF_CLASSES = "Choose a model for sequence classification, or a loss on embeddings."


def _width(config: Any, directory: Path, reads: str, trust: bool) -> int | str:
    """Of embeddings or logits that such a model makes; a sentence where it makes none of two sentences."""
    model = skeleton_of(config, directory, trust_remote_code=trust)
    ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    forward: Any = model if reads == LOGITS else model.base_model
    if MASK not in signature(forward.forward).parameters:
        return f"its forward takes no {MASK}"
    try:
        with torch.no_grad():
            made = read_by(forward, reads, {"input_ids": ids})
    except Exception as error:  # whatever a model's own code raises over inputs that nobody meant for it
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    wanted = (2,) if reads == LOGITS else (2, 3)
    if tuple(made.shape[:-1]) != wanted:
        return f"it makes a tensor of shape {tuple(made.shape)} of 2 sentences of 3 tokens"
    return int(made.shape[-1])
