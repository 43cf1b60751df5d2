"""One export: whatever the checkpoint, through the table of targets."""

from __future__ import annotations

from pathlib import Path

from compresskit.errors import FormatError
from compresskit.exports import EXPORTS
from compresskit.exports.base import prospect_of
from compresskit.modeling import ModelSource
from compresskit.modeling.packed import unpacked


def export_model(source: ModelSource, to: str, out: Path) -> tuple[str, ...]:
    """Write ``source`` into the empty directory ``out`` as target ``to`` holds it.

    Args:
        source: a checkpoint, dense, with grids, or packed.
        to: a name of ``compresskit.exports.EXPORTS``.
        out: an existing directory; the caller publishes it.

    Returns:
        Sentences about what the target holds only nearly.

    Raises:
        UnknownMethodError: no such target.
        FormatError: every fault that keeps the target from holding the model.
    """
    EXPORTS.require(to, where="--to")
    exporter = EXPORTS[to]()
    model = unpacked(source)
    if faults := exporter.faults(prospect_of(model), f"export to {to}"):
        raise FormatError(*faults)
    return exporter.write(model, out)
