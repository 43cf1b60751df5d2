"""Rows by their contents: whatever the order, the epoch, the rank or the batch size, a row has one name.

Shapes: R = different rows, B = rows of a batch, T = tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from compresskit.progress import Progress
from compresskit.training.objective import supervised_tokens
from compresskit.training.order import Rows

HASHED = ("input_ids", "position_ids", "labels")
HASH_BYTES = 16
LONG = 20_000
"""Rows from which reading them all shows its progress."""


@dataclass(frozen=True, slots=True)
class Roll:
    """All different rows of a run that supervise a token, in the order of their hashes.

    Attributes:
        hash_R2: uint64 (R, 2), increasing.
        source_R2: int64 (R, 2): in which of ``rows``, and which of its rows.
        tokens_R: int64 (R,), supervised tokens.
        width_R: int64 (R,), tokens.
        is_packed: whether a row has documents that must not see each other: positions that begin again.
        rows: where they are read.
    """

    hash_R2: npt.NDArray[np.uint64]
    source_R2: npt.NDArray[np.int64]
    tokens_R: npt.NDArray[np.int64]
    width_R: npt.NDArray[np.int64]
    is_packed: bool
    rows: Sequence[Rows]

    def __len__(self) -> int:
        return len(self.hash_R2)

    def row(self, place: int) -> Mapping[str, Tensor]:
        """The row at ``place`` of the roll."""
        which, index = self.source_R2[place].tolist()
        row: Mapping[str, Tensor] = self.rows[which][index]
        return row

    @property
    def digest(self) -> str:
        """Of all rows, whatever their order and however often each is there."""
        return hashlib.blake2b(self.hash_R2.tobytes(), digest_size=HASH_BYTES).hexdigest()


def row_hashes(batch: Mapping[str, Tensor]) -> npt.NDArray[np.uint64]:
    """128 bits that name each row of a batch of int64 (B, T) tensors, (B, 2)."""
    arrays = [np.ascontiguousarray(batch[name].cpu().numpy(), dtype="<i8") for name in HASHED]
    digests = [
        hashlib.blake2b(b"".join(array[row].tobytes() for array in arrays), digest_size=HASH_BYTES).digest()
        for row in range(len(arrays[0]))
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2).astype(np.uint64)


def enrolled(rows: Sequence[Rows]) -> Roll:
    """Read all of ``rows`` once.

    Args:
        rows: what a run trains and is evaluated on.

    Returns:
        Those that supervise a token; a row that is there more than once is listed once.
    """
    total = sum(map(len, rows))
    hashes = np.empty((total, 2), dtype=np.uint64)
    found: Any = np.empty((total, 4), dtype=np.int64)
    done, is_packed = 0, False
    bar = Progress("Reading rows", total, unit="rows") if total >= LONG else None
    for which, part in enumerate(rows):
        for index in range(len(part)):
            row = part[index]
            batch = {name: row[name][None] for name in HASHED}
            hashes[done] = row_hashes(batch)[0]
            found[done] = which, index, supervised_tokens(batch["labels"]), batch["labels"].shape[1]
            is_packed = is_packed or bool((row["position_ids"][1:] == 0).any())
            done += 1
            if bar is not None:
                bar.advance()
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    order = order[found[order, 2] > 0]
    hashes, found = hashes[order], found[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (hashes[1:] != hashes[:-1]).any(1)
    hashes, found = hashes[first], found[first]
    return Roll(hashes, found[:, :2], found[:, 2], found[:, 3], is_packed, rows)
