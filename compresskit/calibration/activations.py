"""The hidden states between two blocks, one tensor a row: in memory, or in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """``hidden[row]`` for each calibration row; each row keeps its shape and dtype.

    Args:
        spill: a file to keep them in instead of memory; removed by :meth:`close`.
    """

    def __init__(self, spill: Path | None = None) -> None:
        self._held: dict[int, Tensor] = {}
        self._places: dict[int, tuple[int, torch.dtype, torch.Size]] = {}
        self._spill = spill
        self._end = 0
        self._file = None
        if spill is not None:
            spill.parent.mkdir(parents=True, exist_ok=True)
            self._file = spill.open("w+b", buffering=0)

    def __setitem__(self, row: int, hidden: Tensor) -> None:
        hidden = hidden.detach().to("cpu").contiguous()
        if self._file is None:
            self._held[row] = hidden
            return
        content = hidden.reshape(-1).view(torch.uint8).numpy().data
        offset, dtype, shape = self._places.setdefault(row, (self._end, hidden.dtype, hidden.shape))
        if (dtype, shape) != (hidden.dtype, hidden.shape):
            raise ValueError(f"row {row} was {dtype} {tuple(shape)}, is {hidden.dtype} {tuple(hidden.shape)}")
        self._end = max(self._end, offset + len(content))
        self._file.seek(offset)
        done = 0
        while done < len(content):
            done += self._file.write(content[done:])

    def __getitem__(self, row: int) -> Tensor:
        if self._file is None:
            return self._held[row]
        offset, dtype, shape = self._places[row]
        flat = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        content = flat.numpy().data
        self._file.seek(offset)
        done = 0
        while done < len(content):
            count = self._file.readinto(content[done:])
            if not count:
                raise OSError(f"{self._spill} has become shorter")
            done += count
        return flat.view(dtype).reshape(shape)

    def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        if self._file is not None and self._spill is not None:
            self._file.close()
            self._spill.unlink(missing_ok=True)
