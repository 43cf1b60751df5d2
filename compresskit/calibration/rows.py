"""Calibration rows, the documents packed into them, and batches of these. B = documents, T = tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compresskit.calibration.oneshot import BATCH_TOKENS

Row = Mapping[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class Documents(Sequence[Row]):
    """The documents of packed rows, one by one: a row is cut wherever its ``position_ids`` start again at 0.

    Not every model keeps packed documents apart (OPT and BERT attend across them, whatever the positions
    say); alone in a row they cannot meet. Rows are read when asked for, never held.

    Args:
        rows: each with ``input_ids`` (T,) and, if it has them, the others of :data:`INPUTS`.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._cuts: list[tuple[int, int, int]] = []
        self.num_tokens = 0
        for index in range(len(rows)):
            row = rows[index]
            length = row["input_ids"].numel()
            starts = [0]
            if "position_ids" in row:
                zeros = (row["position_ids"].reshape(-1) == 0).nonzero().flatten().tolist()
                starts += [start for start in zeros if start > 0]
            pieces = zip(starts, [*starts[1:], length], strict=True)
            self._cuts += [(index, begin, end) for begin, end in pieces if self._count(row, begin, end)]

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        """Each input of document ``index`` as (1, T)."""
        row, begin, end = self._cuts[index]
        whole = self._rows[row]
        cut = {key: whole[key].reshape(1, -1)[:, begin:end] for key in INPUTS if key in whole}
        if "position_ids" in cut and _is_counting(cut["position_ids"]):
            del cut["position_ids"]  # what a model assumes anyway
        return cut

    def _count(self, row: Row, begin: int, end: int) -> int:
        """Tokens of one document that are no padding; added to the total."""
        mask = row.get("attention_mask")
        tokens = end - begin if mask is None else int(mask.reshape(-1)[begin:end].count_nonzero())
        self.num_tokens += tokens
        return tokens


class Batches(Sequence[Row]):
    """Documents of one length together, so that one run of a block serves them all; nothing is padded.

    Args:
        documents: in the order of their first members come the batches.
        max_tokens: of a batch; a longer document is one of its own.
    """

    def __init__(self, documents: Documents, max_tokens: int = BATCH_TOKENS) -> None:
        self._documents = documents
        open_groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        self._groups: list[list[int]] = []
        for index in range(len(documents)):
            row = documents[index]
            length = row["input_ids"].shape[1]
            kind = (length, tuple(row))
            group = open_groups.get(kind)
            if group is None or (len(group) + 1) * length > max_tokens:
                group = open_groups[kind] = []
                self._groups.append(group)
            group.append(index)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        """Each input of batch ``index`` as (B, T)."""
        rows = [self._documents[n] for n in self._groups[index]]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def _is_counting(position_ids: Tensor) -> bool:
    flat = position_ids.reshape(-1)
    return torch.equal(flat, torch.arange(len(flat), dtype=flat.dtype, device=flat.device))
