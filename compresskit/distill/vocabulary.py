"""May this teacher teach this student? Their token ids must mean the same; found out before weights are read.

Model families pad their embeddings to different sizes (Qwen2.5: 151,936 rows below 7B, 152,064 above) while
the tokenizers agree. Then both projections are cut to the rows they share, which is exact: no text holds the
rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.distill.align.checks import tokenizer_faults
from compresskit.errors import Fault, InputError
from compresskit.modeling import ModelSource, load_tokenizer, open_model
from compresskit.training.isolation import probed_faults
from compresskit.training.outlook import scale_faults

if TYPE_CHECKING:
    from compresskit.data.spec import DataSpec
    from compresskit.stage import Outlook

SHOWN = 3


def teacher_faults(
    teacher: str | None, data: DataSpec, model: Outlook, where: str, *, is_aligned: bool = False
) -> list[Fault]:
    """What is wrong with ``teacher`` for a student such as ``model``; reads headers and tokenizers only.

    Args:
        teacher: directory or hub id; None is the model before the first stage.
        data: what the stage trains on.
        model: the student to be.
        where: of the stage.
        is_aligned: whether teacher and student may have different tokenizers.
    """
    trust = model.trust_remote_code
    try:
        source = open_model(teacher or str(model.original), trust_remote_code=trust)
    except InputError as error:
        return [teacher_fault(f"{where}.teacher", fault) for fault in error.faults]
    if not source.anatomy.is_causal or source.anatomy.head is None:
        got = type(source.config).__name__
        cure = "Choose a causal language model."
        return [Fault(f"{where}.teacher", "a causal language model", got, cure)]
    faults = []
    if teacher:  # of the model before the first stage the student's own faults tell already
        faults = scale_faults(source.config, f"{where}.teacher") + probed_faults(
            f"{where}.teacher",
            source.config,
            source.anatomy,
            source.directory,
            trust_remote_code=trust,
            isolated=not data.cross_documents,
        )
    rows, where = vocabulary_of(model.config), f"{where}.teacher"
    return faults + vocabulary_faults(
        model.tokenizer, rows, source, where, trust_remote_code=trust, is_aligned=is_aligned
    )


def vocabulary_faults(
    tokenizer: Path,
    rows: int,
    teacher: ModelSource,
    where: str,
    *,
    trust_remote_code: bool = False,
    is_aligned: bool = False,
) -> list[Fault]:
    """Why the token ids of ``teacher`` do not mean what the student's mean.

    Args:
        tokenizer: directory of the student's.
        rows: ids the student's embedding has.
        teacher: opened, its weights unread.
        where: prefix of each fault.
        trust_remote_code: whether code beside a tokenizer may run.
        is_aligned: whether they need not, as long as both spell the same text.
    """
    if is_aligned:
        both = rows, vocabulary_of(teacher.config)
        return tokenizer_faults(tokenizer, teacher, where, rows=both, trust_remote_code=trust_remote_code)
    try:
        ours, theirs = (
            load_tokenizer(d, trust_remote_code=trust_remote_code).get_vocab()
            for d in (tokenizer, teacher.directory)
        )
    except InputError as error:
        return [teacher_fault(where, fault) for fault in error.faults]
    cure = (
        "Choose a teacher with the student's tokenizer; or build the student anew with the teacher's; "
        "or compare them as they are: alignment: spans, or loss: uld with alignment: uld."
    )
    if ours != theirs:
        differ = [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]
        shown = ", ".join(f"{t!r} is {ours.get(t)} and {theirs.get(t)}" for t in sorted(differ)[:SHOWN])
        got = f"{len(differ)} tokens that differ (student {len(ours)}, teacher {len(theirs)} in all): {shown}"
        return [Fault(where, "the same token ids in teacher and student", got, cure)]
    needed = max(ours.values(), default=-1) + 1
    shared = shared_vocabulary(rows, teacher)
    if shared < needed:
        got = f"{rows} rows in the student and {vocabulary_of(teacher.config)} in the teacher"
        return [Fault(where, f"an output projection for each of {needed} token ids", got, cure)]
    return []


def shared_vocabulary(rows: int, teacher: ModelSource) -> int:
    """How many ids both projections have, given that the tokenizers agree."""
    return min(rows, vocabulary_of(teacher.config))


def vocabulary_of(config: Any) -> int:
    """Rows of the output projection of a model with such a configuration."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def teacher_fault(where: str, fault: Fault | str) -> Fault:
    """A fault of opening a teacher or its tokenizer, told at ``where``."""
    if isinstance(fault, str):
        return Fault(where, "a usable teacher", fault, "Choose another one.")
    return Fault(f"{where} ({fault.where})", fault.expected, fault.got, fault.cure)
