"""How large a cache will be, before a token of its data was counted."""

from __future__ import annotations

from pathlib import Path

from compresskit.data.corpus import open_corpus
from compresskit.data.spec import DataSpec
from compresskit.distill.placements.cache import SAMPLED
from compresskit.errors import InputError
from compresskit.modeling import load_tokenizer
from compresskit.progress import size

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
