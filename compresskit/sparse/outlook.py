"""What can be told of zeroing weights before it runs: the memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.calibration.oneshot import (
    calibration_bytes,
    gram_bytes,
    largest_layer,
    probe_bytes,
    refine_bytes,
    spilled_bytes,
    walk_bytes,
)
from compresskit.sparse import ALLOCATIONS, PRUNERS
from compresskit.stage import Forecast, Outlook

if TYPE_CHECKING:
    from compresskit.sparse.stage import Prune


def forecast_zeroing(stage: Prune, model: Outlook) -> Forecast:
    """The outlook stays as it is; memory is what lies outside the blocks, one block and the calibration rows.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
    """
    anatomy, layers = model.anatomy, stage.layers(model)
    # A score in float32, what selecting among all of a layer needs, and masks.
    memory = walk_bytes(anatomy, model.weight_bytes) + largest_layer(anatomy, layers) * (4 + 12 + 4)
    spilled = 0
    if "input_gram" in PRUNERS[stage.method].needs:
        memory += gram_bytes(anatomy, layers)
    if stage.reads_data:
        memory += calibration_bytes(stage, model.config, anatomy)
        spilled = spilled_bytes(stage, model.config, anatomy)
    if stage.recover is not None:
        more, on_disk = refine_bytes(stage, model.config, anatomy, layers)
        memory, spilled = memory + more, spilled + on_disk
    if ALLOCATIONS[stage.division.method].reads == "costs":
        memory = max(memory, probe_bytes(anatomy, model.weight_bytes))
    return Forecast(
        after=model,
        layers=len(layers),
        memory_bytes=round(memory),
        scratch_bytes=spilled,
        notes=tuple(stage.uneven(model)),
    )
