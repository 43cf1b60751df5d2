"""Values between two runs of a model, one tensor a batch: in memory, or in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """``hidden[batch]``, written and read any number of times; each is a copy, to be changed at will.

    Args:
        spill: a file to keep them in instead of memory; removed by :meth:`close`.
    """

    def __init__(self, spill: Path | None = None) -> None:
        self._held: dict[int, Tensor] = {}
        self._places: dict[int, tuple[int, int]] = {}  # where, and how much fits
        self._forms: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._spill = spill
        self._end = 0
        self._file = None
        if spill is not None:
            spill.parent.mkdir(parents=True, exist_ok=True)
            self._file = spill.open("w+b", buffering=0)

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        if self._file is None:
            self._held[batch] = hidden.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return
        hidden = hidden.detach().to("cpu").contiguous()
        content = hidden.reshape(-1).view(torch.uint8).numpy().data
        offset, room = self._places.get(batch, (0, -1))
        if len(content) > room:
            offset, room = self._end, len(content)
            self._end += room
        self._places[batch] = offset, room
        self._forms[batch] = hidden.dtype, hidden.shape
        self._file.seek(offset)
        done = 0
        while done < len(content):
            done += self._file.write(content[done:])

    def __getitem__(self, batch: int) -> Tensor:
        if self._file is None:
            return self._held[batch].clone()
        (offset, _), (dtype, shape) = self._places[batch], self._forms[batch]
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

    def clear(self) -> None:
        """Forget everything but the file, which takes the next values in place of these, and so faster."""
        self._held.clear()
        self._forms.clear()

    def close(self) -> None:
        """Forget everything, and remove the file."""
        self.clear()
        if self._file is not None and self._spill is not None:
            self._file.close()
            self._spill.unlink(missing_ok=True)
