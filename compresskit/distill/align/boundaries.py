"""Where tokens of two tokenizers end at the same place of a text, or but for a space between words.

Offsets are bytes of a text that begins with one space: that which sentencepiece's tokenizers put before any
text. A tokenizer that does not starts at offset 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NOWHERE = -1
FIRST = 1
"""Offset of the text itself; openings such as BOS end there or before."""
PROBE_PIECES, PROBE_BYTES, SEARCHED_BYTES = 4, 4, 64
"""After a place where a teacher's tokens do not spell the text, so many of them have to, this near."""


class Rendered(NamedTuple):
    """What a document's tokens spell.

    Attributes:
        text: with one space before it.
        ends: offset where each token ends; NOWHERE for one that spells nothing known.
        start: offset before the first token that spells anything.
    """

    text: bytes
    ends: list[int]
    start: int


class Match(NamedTuple):
    """Two tokens that end together.

    Attributes:
        ours: the student's.
        theirs: the teacher's.
        space: 1 where the student has read a space that the teacher has not, -1 the other way round, else 0.
    """

    ours: int
    theirs: int
    space: int


def render(pieces: Sequence[bytes | None], *, space_is_put: bool) -> Rendered:
    """The text of a document and where its tokens end in it.

    Args:
        pieces: what each token spells; openings such as BOS spell ``b""``.
        space_is_put: whether a space at the beginning is one that a tokenizer puts before any text.
    """
    spelt = b"".join(piece or b"" for piece in pieces)
    start = 0 if space_is_put and spelt.startswith(b" ") else FIRST
    ends, at = [], start
    for piece in pieces:
        at += len(piece or b"")
        ends.append(NOWHERE if piece is None else at)
    return Rendered(spelt if start == 0 else b" " + spelt, ends, start)


def walk(pieces: Sequence[bytes | None], text: bytes, start: int) -> list[int]:
    """Where each token of another tokenizer ends in ``text``; NOWHERE for what does not spell it.

    Args:
        pieces: what each token spells; ``b""`` for openings and closings that are not in the text.
        text: what was tokenised, with one space before it.
        start: offset of the first token that spells anything.
    """
    ends, at, lost = [], start, False
    for index, piece in enumerate(pieces):
        if not lost and piece is not None and text.startswith(piece, at):
            at += len(piece)
        elif not lost and index and piece and piece[:1] == b" " and text.startswith(piece[1:] or b" ", at):
            at += len(piece) - 1  # put there anew, after a special token
        else:
            found = _found(pieces[index:], text, at)
            lost = found == NOWHERE
            at = at if lost else found + len(piece or b"")
        ends.append(NOWHERE if lost else at)
    return ends


def _found(pieces: Sequence[bytes | None], text: bytes, at: int) -> int:
    """Where ``text`` goes on with these tokens; NOWHERE if it cannot be said."""
    probe = b""
    for piece in pieces[:PROBE_PIECES]:
        if piece is None:
            break
        probe += piece
    if len(probe) < PROBE_BYTES:
        return NOWHERE
    return text.find(probe, at, at + SEARCHED_BYTES + len(probe))


def common(student: Sequence[int], teacher: Sequence[int], text: bytes) -> list[Match]:
    """Tokens of both that end at the same offset, or but for one space, in the order of the student's.

    Some tokenizers write the space between two words before a word, and others after it. Of several tokens
    that end at an offset only one knows just the text before it: the last of the openings, and elsewhere the
    first.

    Args:
        student: ends of its tokens.
        teacher: of its own.
        text: what they spell.
    """
    theirs, found = _ending(teacher), []
    for end, token in _ending(student).items():
        if end in theirs:
            found.append(Match(token, theirs[end], 0))
        elif text[max(end - 1, 0) : end] == b" " and end - 1 in theirs:
            found.append(Match(token, theirs[end - 1], 1))
        elif text[end : end + 1] == b" " and end + 1 in theirs:
            found.append(Match(token, theirs[end + 1], -1))
    return found


def _ending(ends: Sequence[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for token, end in enumerate(ends):
        if end != NOWHERE and (end not in found or end <= FIRST):
            found[end] = token
    return found
