"""A teacher with another tokenizer: it reads the same documents in its own tokens.

Shapes: B = rows, T = the student's tokens of a row, U = the teacher's, M = matches, E = the teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compresskit.distill.align import ALIGNMENTS
from compresskit.distill.align.base import Alignment, Matched
from compresskit.distill.align.boundaries import NOWHERE, Match, common, render, walk
from compresskit.distill.align.spelling import Spelling, beginnings, spelling_of, twins
from compresskit.distill.few_bits import sample
from compresskit.errors import Fault, ModelError
from compresskit.modeling import load_tokenizer
from compresskit.training.beginning import identity_of, words_of_teacher
from compresskit.training.job import Part
from compresskit.training.objective import IGNORED, Approximate, Hidden, Signal, TeacherProvider
from compresskit.training.order import Rows


class _Document(NamedTuple):
    """A document in the teacher's tokens, and where they end with the student's.

    Attributes:
        ids: the teacher's.
        matches: tokens that end together, each counted from its own first.
    """

    ids: list[int]
    matches: list[Match]


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """A ``TeacherProvider`` around one that has whole distributions.

    Attributes:
        teacher: the ``Part`` that makes it, as a mapping.
        student_tokenizer: directory.
        teacher_tokenizer: directory.
        longest: tokens of a document that the teacher reads; what is beyond is not told.
        alignment: a name of ``ALIGNMENTS``.
        options: its fields.
        students: ids of the student's vocabulary.
        temperature: of the losses.
        trust_remote_code: whether code beside a tokenizer may run.
    """

    teacher: Mapping[str, Any]
    student_tokenizer: str
    teacher_tokenizer: str
    longest: int
    alignment: str
    options: Mapping[str, Any] = field(default_factory=dict)
    students: int
    temperature: float = 1.0
    trust_remote_code: bool = False

    @property
    def identity(self) -> str:
        """See ``Known``."""
        beside = ("teacher", "student_tokenizer", "teacher_tokenizer")
        return f"{identity_of(self, beside=beside)} of {words_of_teacher(self._provider)}"

    @cached_property
    def _provider(self) -> TeacherProvider:
        made: TeacherProvider = Part(**self.teacher).make()
        return made

    @cached_property
    def _alignment(self) -> Alignment:
        made: Alignment = ALIGNMENTS[self.alignment](**self.options)
        return made

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.teacher_tokenizer, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _students_tokenizer(self) -> Any:
        return load_tokenizer(self.student_tokenizer, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _spellings(self) -> tuple[Spelling, Spelling]:
        """Of the student and of the teacher."""
        ours, theirs = self._students_tokenizer, self._tokenizer
        found = spelling_of(ours, roles_of=theirs), spelling_of(theirs)
        if found[0] is None or found[1] is None:
            cure = "Use byte-level or sentencepiece tokenizers."
            raise ModelError(Fault("alignment", "tokens that are pieces of the text", "others", cure))
        return found[0], found[1]

    @cached_property
    def _twins(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``twins_S2``, ``spaced_R2``, ``opens_V`` and ``open_2W`` of ``Matched``.

        Raises:
            ModelError: the alignment reads them, and no token of the teacher's is one of the student's.
        """
        none_02 = torch.empty(0, 2, dtype=torch.int64)
        found, open_2W = [], torch.zeros(2, self.students, dtype=torch.bool)
        if not self._alignment.reads_twins:
            return none_02, none_02, torch.zeros(len(self._spellings[1].pieces), dtype=torch.bool), open_2W
        for space in (False, True):
            begun = beginnings(self._students_tokenizer, self._tokenizer, space=space)
            pairs = [p for p in twins(*self._spellings, space=space) if not begun.teachers[p[1]]]
            found.append(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))
            known = torch.tensor(begun.students[: self.students])
            open_2W[int(space), : len(known)] = known
        if not len(found[0]):
            cure = "Set alignment to uld, or choose a teacher of longer tokens."
            expected = "a token of the teacher's that says as much as one of the student's"
            raise ModelError(Fault(f"alignment {self.alignment}", expected, "none", cure))
        opens = [(piece or b"").startswith(b" ") for piece in self._spellings[1].pieces]
        return found[0], found[1], torch.tensor(opens), open_2W

    @cached_property
    def _openings(self) -> int:
        """How many tokens the teacher's tokenizer puts before a text."""
        whole = self._tokenizer("a", verbose=False)["input_ids"]
        bare = self._tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        return next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)

    @property
    def hidden(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """See ``TeacherProvider.hidden``."""
        return self._provider.hidden

    def load(self) -> None:
        """See ``TeacherProvider.load``; the tokenizers too."""
        self._provider.load()
        _ = self._spellings, self._twins, self._openings

    def told(self, rows: Rows, device: torch.device) -> tuple[str, ...]:
        """See ``Approximate.told``: what the provider inside tells, of a few rows in the teacher's tokens."""
        if not isinstance(self._provider, Approximate):
            return ()
        read = []
        for index in sample(len(rows)):
            row = rows[index]
            (starts,) = _starts(row["position_ids"][None])
            read.append([document.ids for _, document in self._documents(row["input_ids"].tolist(), starts)])
        ids_BU, positions_BU = _packed(read)
        own_B1 = torch.tensor([[sum(map(len, documents))] for documents in read])
        labels_BU = ids_BU.masked_fill(torch.arange(ids_BU.shape[1]) >= own_B1, IGNORED)
        batch = {"input_ids": ids_BU, "position_ids": positions_BU, "labels": labels_BU}
        theirs = [{name: tensor[i] for name, tensor in batch.items()} for i in range(len(read))]
        return self._provider.told(theirs, device)

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """What the teacher says where its tokens end with the student's.

        Args:
            inputs: ``input_ids`` and ``position_ids``, each int64 (B, T), in the student's tokens; a document
                begins where the position is 0.

        Raises:
            ValueError: the teacher has no whole distributions.
        """
        ids_BT, device = inputs["input_ids"], inputs["input_ids"].device
        rows = [
            self._documents(ids, starts)
            for ids, starts in zip(ids_BT.tolist(), _starts(inputs["position_ids"]), strict=True)
        ]
        theirs_BU, positions_BU = _packed([[d.ids for _, d in row] for row in rows])
        said = self._provider.signal(
            {"input_ids": theirs_BU.to(device), "position_ids": positions_BU.to(device)}
        ).says
        if not isinstance(said, Hidden):
            raise ValueError("an alignment needs a teacher that gives whole distributions")
        matches = torch.tensor(_matches(rows), dtype=torch.int64, device=device).reshape(-1, 6)
        row_M, ours_M, theirs_M, space_M, next_M, next_space_M = matches.unbind(-1)
        twins_S2, spaced_R2, opens_V, open_2W = (table.to(device) for table in self._twins)
        matched = Matched(
            ids_BT=ids_BT,
            theirs_BU=theirs_BU.to(device),
            row_M=row_M,
            ours_M=ours_M,
            theirs_M=theirs_M,
            space_M=space_M,
            next_M=next_M,
            next_space_M=next_space_M,
            twins_S2=twins_S2,
            spaced_R2=spaced_R2,
            opens_V=opens_V,
            open_2W=open_2W,
            students=self.students,
            teachers=said.head.weight_VD.shape[0],
        )
        return self._alignment(matched, said, self.temperature)

    def _documents(self, ids: list[int], starts: list[int]) -> list[tuple[int, _Document]]:
        """The documents of a row, and where each begins in the student's tokens."""
        ends = [*starts[1:], len(ids)]
        return [(a, self._document(ids[a:b])) for a, b in zip(starts, ends, strict=True)]

    def _document(self, ids: list[int]) -> _Document:
        """One document anew, in the teacher's tokens."""
        ours, theirs = self._spellings
        pieces = ours.of(ids)
        if ids[0] == ours.bos:
            pieces[0] = b""
        put = ours.begins_with_space or theirs.begins_with_space
        text, ends, _ = render(pieces, space_is_put=put)
        # A row may begin or end inside a character, of which the teacher reads nothing.
        told = self._tokenizer(text[1:].decode(errors="ignore"), verbose=False)["input_ids"][: self.longest]
        spelt = [b"" if i < self._openings else piece for i, piece in enumerate(theirs.of(told))]
        begins = 0 if theirs.begins_with_space else 1
        return _Document(told, common(ends, walk(spelt, text, begins), text))


def _starts(positions_BT: Tensor) -> list[list[int]]:
    """Where documents begin, of each row; the row itself is one."""
    return [sorted({0, *(row == 0).nonzero()[:, 0].tolist()}) for row in positions_BT.cpu()]


def _packed(rows: Sequence[Sequence[list[int]]]) -> tuple[Tensor, Tensor]:
    """The teacher's rows (B, U) and positions, filled up to one length with a document of zeros."""
    length = max(1, *(sum(map(len, row)) for row in rows))
    ids, positions = [], []
    for row in rows:
        parts = [*row, [0] * (length - sum(map(len, row)))]
        ids.append([token for part in parts for token in part])
        positions.append([place for part in parts for place in range(len(part))])
    return torch.tensor(ids), torch.tensor(positions)


def _matches(rows: Sequence[Sequence[tuple[int, _Document]]]) -> list[tuple[int, ...]]:
    """The columns of ``Matched``: row, tokens, space, and the match of the student's next token."""
    found: list[tuple[int, ...]] = []
    for row, documents in enumerate(rows):
        before = 0
        for start, document in documents:
            after = {match.ours - 1: match for match in document.matches}
            for ours, theirs, space in document.matches:
                follower = after.get(ours)
                there = (NOWHERE, 0) if follower is None else (before + follower.theirs, follower.space)
                found.append((row, start + ours, before + theirs, space, *there))
            before += len(document.ids)
    return found
