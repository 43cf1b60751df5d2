"""One export: whatever the checkpoint, through the table of targets."""

from __future__ import annotations

from pathlib import Path

from compresskit.errors import FormatError
from compresskit.exports import EXPORTS
from compresskit.exports.base import adapter_fault, prospect_of
from compresskit.formats.checkpoint import ADAPTER
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
    faults = exporter.faults(prospect_of(model), f"export to {to}")
    if (source.directory / ADAPTER).is_dir():
        got = f"{source.directory}, which has an adapter beside it that no target holds"
        faults.append(adapter_fault(got, f"export to {to}"))
    if faults:
        raise FormatError(*faults)
    return exporter.write(model, out)
