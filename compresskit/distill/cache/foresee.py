"""How large a cache will be, before a token of its data was counted."""

from __future__ import annotations

from pathlib import Path

from compresskit.data.corpus import open_corpus
from compresskit.data.spec import DataSpec
from compresskit.distill.placements.cache import SAMPLED
from compresskit.errors import InputError
from compresskit.kernels.chunking import loss_bytes
from compresskit.modeling import ModelSource, load_tokenizer
from compresskit.progress import size
from compresskit.training.fields import TrainingFields

READ_CHARACTERS = 32_000_000
TOKENISED_CHARACTERS = 200_000


def expected_tokens(spec: DataSpec, tokenizer: Path, trust_remote_code: bool) -> tuple[int, bool] | None:
    """About how many tokens a source holds, from the first of its documents.

    Args:
        spec: the source.
        tokenizer: directory of the student's.
        trust_remote_code: whether code beside it may run.

    Returns:
        The number, and whether all of the source was read; None of what is not on this machine.
    """
    if spec.sources:
        found = [expected_tokens(part, tokenizer, trust_remote_code) for part in spec.parts()]
        known = [one for one in found if one is not None]
        return (sum(n for n, _ in known), all(w for _, w in known)) if len(known) == len(found) else None
    try:
        corpus = open_corpus(spec)
        if corpus.source.kind == "hub":
            return None
        encode = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        characters = some = tokens = 0
        for content in corpus.documents("all"):
            text = str(content)
            characters += len(text)
            if some < TOKENISED_CHARACTERS:
                some += len(text)
                tokens += len(encode(text, verbose=False)["input_ids"])
            if characters > READ_CHARACTERS:
                break
    except InputError:
        return None  # what is wrong with the source is told by itself
    return round(tokens * characters / max(some, 1)), characters <= READ_CHARACTERS


def building_bytes(teacher: ModelSource, vocabulary: int, tokens: int, device: str, *, models: int) -> int:
    """What filling a cache holds at its peak: the teacher, one pass of it, and logits.

    Args:
        teacher: opened.
        vocabulary: ids it shares with the student.
        tokens: of a pass.
        device: ``cpu`` or ``cuda``.
        models: whose logits are alive at once.
    """
    text = teacher.config.get_text_config()
    width = getattr(text, "hidden_size", 0) or 0
    inner = getattr(text, "intermediate_size", None) or 4 * width
    # Of one block at a time: the state it adds to, its norm, queries, keys, values and output, and the FFN's.
    states = tokens * (6 * width + 3 * inner) * teacher.compute_dtype.itemsize
    return teacher.bytes + states + loss_bytes(tokens, vocabulary, 0, device, models=models)


def read_in_words(expected: tuple[int, bool], row_tokens: int, fields: TrainingFields) -> str:
    """How many rows a cache will hold, and how many of them are read: a sentence for a plan.

    Args:
        expected: of :func:`expected_tokens`.
        row_tokens: of a row.
        fields: how long is trained.
    """
    tokens, whole = expected
    rows = max(1, -(-tokens // row_tokens))
    items = fields.steps_over(rows) * fields.batch_size
    more = "" if whole else " or more"
    said = f"It holds all rows of both splits, about {rows:,}{more} of {row_tokens:,} tokens"
    if items >= rows:
        return f"{said}; the steps read {items:,}."
    return (
        f"{said}, of which the steps read {items:,}: it serves longer runs on the same data, too. Limit the "
        "documents of the data to make it smaller."
    )


def in_words(keep: str, token_bytes: int, expected: tuple[int, bool] | None, teacher_bytes: int) -> str:
    """A sentence for a plan.

    Args:
        keep: what is kept of a token.
        token_bytes: of one, at most.
        expected: of :func:`expected_tokens`.
        teacher_bytes: of all weights.
    """
    each = f"{'at most ' if keep == SAMPLED else ''}{token_bytes:,} bytes"
    said = f"The teacher's cache ({keep}) takes {each} on disk for each supervised token"
    if expected is not None:
        tokens, whole = expected
        total = f"about {tokens * token_bytes / 1e6:,.1f} MB{'' if whole else ' or more'}"
        said += f", {total} if each of some {tokens:,} tokens is"
    return f"{said}. Before training one process makes it, with the whole teacher: {size(teacher_bytes)}."
