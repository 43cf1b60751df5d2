"""What can be told of zeroing weights before it runs: the memory it takes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from compresskit.registry import locate
from compresskit.sparse import PRUNERS
from compresskit.stage import Forecast, Outlook

if TYPE_CHECKING:
    from compresskit.sparse.stage import Prune

MAX_CONTEXT = 2048
SPILL_BYTES = 1 << 29
DENSE = "Zeros alone make the checkpoint neither smaller nor faster: it is stored dense."


def calibration_length(stage: Prune, config: Any) -> int:
    """Tokens per calibration row: what the stage says, else the model's maximum, 2048 at most."""
    limit: int = locate("compresskit.modeling:context_length")(config)
    return stage.context_length or min(limit, MAX_CONTEXT)


def forecast_zeroing(stage: Prune, model: Outlook) -> Forecast:
    """The outlook stays as it is; memory is what lies outside the blocks, one block and the calibration rows.

    Args:
        stage: has no faults for ``model``.
        model: what the stage will be given.
    """
    anatomy, per_weight = model.anatomy, model.weight_bytes
    layers = stage.layers(model)
    sizes: dict[str | None, int] = {}
    for name, shape in anatomy.parameter_shapes.items():
        block = anatomy.block_of(name)
        sizes[block] = sizes.get(block, 0) + prod(shape)
    tied = sum(prod(anatomy.parameter_shapes[n]) for group in anatomy.tied for n in group[1:])
    outside = sizes.pop(None, 0) - tied
    largest_block = max(sizes.values(), default=0)
    largest = max(
        (anatomy.linears[n].out_features * anatomy.linears[n].in_features for n in layers), default=0
    )
    # A score in float32, what selecting among all of a layer needs, and masks.
    memory = (outside + 2 * largest_block) * per_weight + largest * (4 + 12 + 4)
    if PRUNERS[stage.method].needs:
        length = calibration_length(stage, model.config)
        width = getattr(model.config, "hidden_size", 0) or 0
        inner = max((linear.out_features for linear in anatomy.linears.values() if linear.block), default=0)
        memory += min(stage.samples * length * width * 4, SPILL_BYTES) + length * (8 * width + 4 * inner) * 4
    return Forecast(after=model, layers=len(layers), memory_bytes=round(memory), notes=(DENSE,))
