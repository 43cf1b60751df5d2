"""Fill a cache: one pass of the teacher over all rows of a run, part by part, each kept as it is finished.

Shapes: B = rows of a pass, T = tokens of a row, N = supervised tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compresskit.distill.cache.faithful import faithfulness
from compresskit.distill.cache.keep import Keep, joined
from compresskit.distill.cache.parts import (
    find_part,
    remove_partials,
    require_sound,
    unwritable,
    write_part,
    write_whole,
)
from compresskit.distill.cache.rows import Roll
from compresskit.distill.cache.store import REPORT, Store, write_index
from compresskit.distill.placements.cache import PASS_TOKENS
from compresskit.progress import Progress
from compresskit.training.objective import Hidden, TeacherProvider, predictions
from compresskit.training.order import stack

PART_BYTES = 1 << 26


def build(folder: Path, roll: Roll, keep: Keep, teacher: TeacherProvider, device: torch.device) -> None:
    """Make what is not there yet of the cache in ``folder``, which this process has locked.

    Args:
        folder: has its facts.
        roll: all rows.
        keep: what is kept of each token.
        teacher: that says its hidden states.
        device: where it runs.

    Raises:
        DataError: a part that is there is damaged.
        OutputError: there is no room.
    """
    remove_partials(folder)
    parts: list[Path | None] = []
    plan = divided(roll, keep.most_bytes())
    for number in range(len(plan)):
        parts.append(find_part(folder, number))
        if (path := parts[-1]) is not None:
            require_sound(path)
    missing = [places for places, path in zip(plan, parts, strict=True) if path is None]
    _require_room(folder, sum(int(roll.tokens_R[part].sum()) for part in missing) * keep.most_bytes())
    done = len(roll) - sum(part.stop - part.start for part in missing)
    with Progress("Asking the teacher", len(roll), unit="rows", done=done) as bar:
        for number, places in enumerate(plan):
            if parts[number] is None:
                parts[number] = _make(folder, number, roll, places, keep, teacher, device, bar)
    made = [path for path in parts if path is not None]
    report: dict[str, Any] = {
        "index": write_index(folder, made),
        "parts": {path.name: path.stat().st_size for path in made},
        "rows": len(roll),
        "tokens": int(roll.tokens_R.sum()),
    }
    store = Store(folder, report, keep.entry_columns)
    report["faithfulness"] = faithfulness(store, roll, keep, teacher, device)
    write_whole(folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())


def divided(roll: Roll, token_bytes: int) -> list[slice]:
    """Consecutive rows of ``roll`` that make one part each: a part has a row more than would fit at most."""
    ends = np.cumsum(roll.tokens_R) * token_bytes
    marks = np.flatnonzero(np.diff(ends // PART_BYTES)) + 1
    begins = [0, *marks.tolist(), len(roll)]
    return [slice(a, b) for a, b in pairwise(begins) if a < b]


def passes(roll: Roll, places: range) -> Iterator[list[int]]:
    """These rows of ``roll``, divided into passes of rows of one length; the same whenever it is asked."""
    for width, same in groupby(places, key=lambda place: int(roll.width_R[place])):
        some, rows = list(same), max(1, PASS_TOKENS // width)
        for begin in range(0, len(some), rows):
            yield some[begin : begin + rows]


def _make(
    folder: Path,
    number: int,
    roll: Roll,
    places: slice,
    keep: Keep,
    teacher: TeacherProvider,
    device: torch.device,
    bar: Progress,
) -> Path:
    """Write one part; batches never reach across parts, so its bytes do not depend on what was there."""
    made = []
    for some in passes(roll, range(places.start, places.stop)):
        batch = {name: tensor.to(device) for name, tensor in stack([roll.row(p) for p in some]).items()}
        with torch.no_grad():
            says = teacher.signal(batch).says
            assert isinstance(says, Hidden)
            hidden_NE, _ = predictions(says.states_BTE, batch["labels"])
            tokens = roll.tokens_R[some].tolist()
            seeds = (roll.hash_R2[some, 0] >> np.uint64(1)).tolist()
            made.append(keep.columns(hidden_NE, says.head, tokens, seeds))
        bar.advance(len(some))
    columns = joined(made)
    made.clear()
    tokens_R = torch.from_numpy(roll.tokens_R[places].copy())
    lines_R = tokens_R.clone()
    if keep.entry_columns:
        begins_R = tokens_R.cumsum(0) - tokens_R
        running_N = torch.cat([tokens_R.new_zeros(1), columns["entries"].long().cumsum(0)])
        lines_R = running_N[begins_R + tokens_R] - running_N[begins_R]
    hashes_R2 = torch.from_numpy(roll.hash_R2[places].view(np.int64).copy())
    return write_part(folder, number, columns | {"hashes": hashes_R2, "tokens": tokens_R, "lines": lines_R})


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise unwritable(folder, f"{needed:,} bytes", f"{free:,} bytes free")


def size_of(report: Mapping[str, Any]) -> int:
    """Bytes of all parts."""
    return sum(report["parts"].values())
