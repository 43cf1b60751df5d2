"""What was packed, read back: every parameter equal to the bit, every grid the same."""

from __future__ import annotations

import json
from pathlib import Path

from compresskit.errors import Fault, FormatError
from compresskit.formats import FORMATS
from compresskit.formats.base import CONFIG, Checkpoint
from compresskit.formats.grid import same_grid
from compresskit.formats.shards import read_header
from compresskit.progress import Progress

MAX_NAMED = 10


def read_back(model: Checkpoint, out: Path) -> int:
    """Decode the packed checkpoint in ``out`` and compare it with the ``model`` it was made from.

    Args:
        model: the dense checkpoint, its quantised weights on their grids.
        out: what was packed from it.

    Returns:
        How many parameters were compared, each a tensor at a time.

    Raises:
        FormatError: a parameter is missing, or differs in a single bit, or lies on another grid.
    """
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    packed_without_grid = config.get("layers", {})
    plain = {
        n
        for n in model.names()
        if not n.endswith(".weight")
        or ((layer := n.removesuffix(".weight")) not in packed_without_grid and model.grid(layer) is None)
    }
    stored = {
        key: place for path in sorted(out.glob("*.safetensors")) for key, place in read_header(path).items()
    }
    copied = plain & stored.keys()
    wrong = [name for name in sorted(copied) if not stored[name].same(model.place(name))]
    left = set(model.names()) - copied
    packed = ((key, place.read()) for key, place in stored.items() if key not in copied)
    with Progress("reading back", len(left), unit="tensors") as progress:
        for name, tensor, grid in FORMATS[config["quant_method"]]().decode(packed, config):
            left.discard(name)
            expected = model.tensor(name)
            same = tensor.dtype == expected.dtype and tensor.equal(expected)
            if not same or not same_grid(grid, model.grid(name.removesuffix(".weight"))):
                wrong.append(name)
            progress.advance()
    if wrong or left:
        names = ", ".join([*wrong, *sorted(left)][:MAX_NAMED])
        got = f"{len(wrong)} that differ and {len(left)} missing: {names}"
        cure = "The disk or the packing is at fault: run again, and report it if it happens again."
        raise FormatError(Fault(str(out), "every parameter as it was before packing", got, cure))
    return len(model.names())
