"""What token ids spell, in bytes: the common ground of two tokenizers.

Byte-level tokenizers write each byte as a character of its own; sentencepiece's write a space as a mark, and
bytes that no token covers one by one. Both are undone here without a detour through text, so that half a
character stays half a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE_MARK = "\u2581"


@dataclass(frozen=True, slots=True)
class Spelling:
    """What every id of a tokenizer spells.

    Attributes:
        pieces: id -> bytes; None for what spells nothing known, such as the token for unknown text.
        begins_with_space: whether the tokenizer puts a space before any text.
        bos: its id, or None.
    """

    pieces: tuple[bytes | None, ...]
    begins_with_space: bool
    bos: int | None

    def of(self, ids: Sequence[int]) -> list[bytes | None]:
        """What each of ``ids`` spells; ids beyond the tokenizer's spell nothing known."""
        known = len(self.pieces)
        return [self.pieces[token] if token < known else None for token in ids]


def spelling_of(tokenizer: Any, *, roles_of: Any = None) -> Spelling | None:
    """The spelling of a transformers tokenizer; None where its tokens are no plain pieces of the text.

    Args:
        tokenizer: byte-level, or sentencepiece's.
        roles_of: another tokenizer; BOS and EOS are spelt as its own, so that they are the same tokens.
    """
    kind = _kind(tokenizer)
    if kind is None:
        return None
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    pieces: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    characters = _byte_characters()
    for token, index in vocabulary.items():
        if kind == "bytes":
            if all(c in characters for c in token):
                pieces[index] = bytes(characters[c] for c in token)
        else:
            byte = BYTE.fullmatch(token)
            pieces[index] = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
    for index, added in tokenizer.added_tokens_decoder.items():
        pieces[index] = str(added.content).encode()
    other = roles_of or tokenizer
    for role in ("bos", "eos"):
        index, literal = getattr(tokenizer, f"{role}_token_id"), getattr(other, f"{role}_token")
        if index is not None and literal is not None:
            pieces[index] = str(literal).encode()
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        pieces[tokenizer.unk_token_id] = None
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    first = next((pieces[i] for i in bare), None) or b""
    return Spelling(tuple(pieces), first.startswith(b" "), tokenizer.bos_token_id)


def twins(student: Spelling, teacher: Spelling, *, space: bool = False) -> list[tuple[int, int]]:
    """Ids that spell the same in both: student's and teacher's, each at most once.

    Sentencepiece has two ids for a letter: a byte that is never used, and after it the letter itself. The
    last ones are paired first. What spells nothing known is like nothing else that does not.

    Args:
        student: its spelling.
        teacher: of its own.
        space: pair those instead of which the teacher's spells a space more, before the same.
    """
    theirs: dict[bytes, list[int]] = {}
    for index, piece in enumerate(teacher.pieces):
        if piece is not None and not space:
            theirs.setdefault(piece, []).append(index)
        elif piece and piece[:1] == b" " and piece[1:]:
            theirs.setdefault(piece[1:], []).append(index)
    found = []
    for index in reversed(range(len(student.pieces))):
        piece = student.pieces[index]
        same = None if piece is None else theirs.get(piece)
        if same:
            found.append((index, same.pop()))
    return sorted(found)


class Beginnings(NamedTuple):
    """What of a teacher's tokens begins longer ones of the student's.

    Attributes:
        teachers: of its ids: whether the student has a token that it spells with that one and more. Its
            probability is divided among that token, others, and the student's of the same spelling.
        students: of the student's ids: whether the teacher spells it by what begins another one.
    """

    teachers: list[bool]
    students: list[bool]


def beginnings(student: Any, teacher: Any, *, space: bool = False) -> Beginnings:
    """Tokens whose spelling says too little of what follows, of two tokenizers that have spellings.

    Args:
        student: its tokenizer.
        teacher: of its own.
        space: of tokens before which the teacher reads a space that the student has read already.
    """
    ours, theirs = spelling_of(student, roles_of=teacher), spelling_of(teacher)
    assert ours is not None
    assert theirs is not None
    cut_ours, cut_theirs = _cutter(student), _cutter(teacher)
    spelt: list[tuple[int, ...]] = []
    for index, piece in enumerate(ours.pieces):
        # What its own tokenizer never says, such as special tokens and spare bytes, begins nothing.
        is_said = piece and index not in student.added_tokens_decoder and cut_ours(piece) == (index,)
        spelt.append(cut_theirs(b" " + piece if space else piece) if piece and is_said else ())
    begun = {ids[:length] for ids in spelt for length in range(1, len(ids))}
    return Beginnings(
        [(index,) in begun for index in range(len(theirs.pieces))], [ids in begun for ids in spelt]
    )


def _cutter(tokenizer: Any) -> Callable[[bytes], tuple[int, ...]]:
    """What makes tokens of a piece of text, before which nothing is put; none of half a character."""
    of_bytes, model = _kind(tokenizer) == "bytes", tokenizer.backend_tokenizer.model
    written = {byte: character for character, byte in _byte_characters().items()}

    def cut(spelt: bytes) -> tuple[int, ...]:
        if of_bytes:
            text = "".join(written[byte] for byte in spelt)
        else:
            text = spelt.decode(errors="ignore").replace(" ", SPACE_MARK)
            if len(text.encode()) < len(spelt):
                return ()
        return tuple(token.id for token in model.tokenize(text))

    return cut


def _kind(tokenizer: Any) -> str | None:
    """``bytes``, ``marks`` (sentencepiece) or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    decoder = state.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    names = {step.get("type") for step in steps}
    if "ByteLevel" in names:
        return "bytes"
    replaced = any((step.get("pattern") or {}).get("String") == SPACE_MARK for step in steps)
    return "marks" if "Metaspace" in names or replaced else None


def _byte_characters() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable ones as themselves, others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    written = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    return written | {chr(256 + place): byte for place, byte in enumerate(others)}
