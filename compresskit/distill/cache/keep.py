"""What may be kept of a teacher's distributions: the contract, and where tokens lie in a batch.

Shapes: N = supervised tokens, E = teacher's hidden width, B = rows, T = tokens of a row, M = entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from compresskit.kernels.chunking import block_tokens
from compresskit.kernels.reference.linear_divergence import Outcomes, Target
from compresskit.kernels.reference.projection import chunks
from compresskit.training.objective import IGNORED, Head, Hidden, Listing

Columns = dict[str, Tensor]
Lay = Callable[[Tensor], Tensor]
"""Lines of the supervised tokens (N, ...) to where they belong in a batch, (B, T, ...); 0 elsewhere."""
SHORT_IDS = 1 << 16
"""Ids that two bytes can name."""


class Keep(Protocol):
    """A frozen dataclass: what is kept of each token, as columns of a table."""

    entry_columns: ClassVar[tuple[str, ...]]
    """Columns with a line for each entry of a token, however many it has; the others have one for each token.
    The number of a token's entries is in the column ``entries`` then."""

    def most_bytes(self) -> int:
        """Of one token, at most."""
        ...

    def columns(self, hidden_NE: Tensor, head: Head, tokens: Sequence[int], seeds: Sequence[int]) -> Columns:
        """What is kept, on the CPU.

        Args:
            hidden_NE: the teacher's, row after row.
            head: of the teacher, onto the ids it shares with the student.
            tokens: of each row.
            seeds: of each row, for draws.
        """
        ...

    def says(self, columns: Columns, lay: Lay, head: Head | None) -> Hidden | Listing:
        """The distributions of a batch, of which ``columns`` hold the lines one row after the other."""
        ...


def ids_type(vocabulary: int) -> torch.dtype:
    """The smallest type that names each of ``vocabulary`` ids."""
    return torch.uint16 if vocabulary <= SHORT_IDS else torch.int32


def told(target: Target, count: int, temperature: float, device: str) -> Iterator[Outcomes]:
    """What ``target`` says of ``count`` tokens, some of them at a time."""
    step = block_tokens(target.vocabulary, device)
    for part in chunks(count, target.vocabulary, device, 0):
        said, size = target.chunk(part, temperature), part.stop - part.start
        for begin in range(0, size, step):
            yield said(slice(begin, min(begin + step, size)))


def layer_out(labels_BT: Tensor) -> Lay:
    """Where the lines of supervised tokens belong in a batch with these labels."""
    keep_BT = torch.zeros_like(labels_BT, dtype=torch.bool)
    keep_BT[:, :-1] = labels_BT[:, 1:] != IGNORED

    def lay(lines: Tensor) -> Tensor:
        whole = torch.zeros(*keep_BT.shape, *lines.shape[1:], dtype=lines.dtype, device=keep_BT.device)
        whole[keep_BT] = lines.to(keep_BT.device)
        return whole

    return lay


def joined(parts: Sequence[Mapping[str, Tensor]]) -> Columns:
    """Tables one below the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
