"""What token ids spell, in bytes: the common ground of two tokenizers.

Byte-level tokenizers write each byte as a character of its own; sentencepiece's write a space as a mark, and
bytes that no token covers one by one. Both are undone here without a detour through text, so that half a
character stays half a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
