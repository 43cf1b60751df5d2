"""What is wrong with an alignment, and the parts of a job that it adds. Told before weights are read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.distill import LOSSES
from compresskit.distill.align import ALIGNMENTS
from compresskit.distill.align.spelling import spelling_of
from compresskit.errors import Fault, InputError
from compresskit.modeling import ModelSource, context_length, load_tokenizer, text_ids
from compresskit.options import Choice, choice_faults, choices_of
from compresskit.training.job import Part
from compresskit.training.lesson import NO_ALIGNMENT, TEXT_ALONE

if TYPE_CHECKING:
    from compresskit.training.lesson import Taught

ALIGNED = "compresskit.distill.align.provider:Aligned"
RANKS, TOP_K = "uld", "top_k"
KEPT = ("cache", "server")
"""Placements of a teacher that has no model here to read other tokens than those it was asked about."""


def alignment_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the alignment of ``stage`` in itself, and with it beside the other fields."""
    named: Choice = stage.alignment
    if named.method == NO_ALIGNMENT:
        expected, got = "no fields beside alignment: none", ", ".join(name for name, _ in named.options)
        return [Fault(f"{where}.alignment", expected, got, "Leave them out.")] if named.options else []
    faults = choice_faults(named, ALIGNMENTS, where=f"{where}.alignment")
    if stage.teacher_placement.method in KEPT:
        cure = "Leave teacher_placement out."
        expected = "a teacher that runs beside the student: an alignment asks it about its own tokens"
        got = stage.teacher_placement.method
        faults.append(Fault(f"{where}.teacher_placement", expected, got, cure))
    if stage.features is not None:
        cure = "Leave features out, or choose a teacher with the student's tokenizer."
        expected = "no alignment beside features, which compare the same tokens"
        got = " + ".join(map(str, choices_of(stage.features)))
        faults.append(Fault(f"{where}.features", expected, got, cure))
    if stage.loss == TEXT_ALONE:
        return faults
    for choice in choices_of(stage.loss):
        if choice.method not in LOSSES:
            continue  # told by itself
        ranks = LOSSES[choice.method].compares_ranks
        if ranks != (named.method == RANKS):
            needed = [name for name in LOSSES if LOSSES[name].compares_ranks == (named.method == RANKS)]
            cure = f"Choose another alignment, or one of these losses: {', '.join(needed)}."
            expected = f"a loss that alignment {named.method} serves"
            faults.append(Fault(f"{where}.loss", expected, choice.method, cure))
        if any(name == TOP_K and value is not None for name, value in choice.options):
            expected = "no top_k: an alignment lists outcomes by itself"
            cure = "Leave top_k out, or set the field top of alignment spans."
            faults.append(Fault(f"{where}.loss", expected, f"top_k of {choice.method}", cure))
    return faults


def tokenizer_faults(
    tokenizer: Path,
    teacher: ModelSource,
    where: str,
    *,
    rows: tuple[int, int],
    trust_remote_code: bool = False,
) -> list[Fault]:
    """Why the tokens of student and teacher cannot be found in one text.

    Args:
        tokenizer: directory of the student's.
        teacher: opened, its weights unread.
        where: prefix of each fault.
        rows: of the student's output projection, and of the teacher's.
        trust_remote_code: whether code beside a tokenizer may run.
    """
    faults = []
    sides = (("student", tokenizer, rows[0]), ("teacher", teacher.directory, rows[1]))
    for side, directory, known in sides:
        try:
            made = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        except InputError as error:
            faults += [
                f if isinstance(f, Fault) else Fault(where, "a tokenizer", f, "Add one.")
                for f in error.faults
            ]
            continue
        if spelling_of(made) is None:
            expected = (
                f"a byte-level or sentencepiece tokenizer of the {side}, whose tokens are pieces of text"
            )
            cure = "Choose a teacher with the student's tokenizer."
            faults.append(Fault(where, expected, type(made).__name__, cure))
        elif (needed := text_ids(made)) > known:
            expected = f"an output projection of the {side} for each of {needed} token ids"
            cure = "Take the tokens out that the model was not trained with, or choose another model."
            faults.append(Fault(where, expected, f"{known} rows", cure))
    return faults


def aligned(stage: Taught, teacher: Part, model: ModelSource, source: ModelSource, trust: bool) -> Part:
    """The provider of ``teacher`` as one for a student with another tokenizer.

    Args:
        stage: has no faults.
        teacher: a provider of whole distributions.
        model: the student.
        source: the teacher, opened.
        trust: whether code beside a tokenizer may run.
    """
    named: Choice = stage.alignment
    return Part(
        ALIGNED,
        {
            "teacher": asdict(teacher),
            "student_tokenizer": str(model.directory),
            "teacher_tokenizer": str(source.directory),
            "longest": context_length(source.config),
            "alignment": named.method,
            "options": dict(named.options),
            "students": spelt_ids(model, trust),
            "temperature": stage.temperature,
            "trust_remote_code": trust,
        },
    )


def spelt_ids(model: ModelSource, trust: bool) -> int:
    """Ids that the tokenizer of ``model`` may give: rows of a projection beyond them stand for no text."""
    return text_ids(load_tokenizer(model.directory, trust_remote_code=trust))
