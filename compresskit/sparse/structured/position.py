"""What a model's code derives from the position of a block, and so changes where a block moves.

It is looked up, not run: numbers and words that modules of a block hold, in the whole model and in the one
without some blocks. What a model derives only while it runs is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from compresskit.modeling.skeleton import skeleton_of
from compresskit.sparse.structured.resize import is_int, resized
from compresskit.sparse.structured.surgery import Patient


def moved(patient: Patient, keep: Sequence[int]) -> list[str]:
    """What differs in a block once only ``keep`` are left: names of values inside, its index aside."""
    blocks = patient.anatomy.blocks
    if len(keep) == len(blocks):
        return []

    def model(config: Any) -> nn.Module:
        return skeleton_of(config, patient.directory, trust_remote_code=patient.trust_remote_code)

    before, after = model(patient.config), model(resized(patient.config, patient.with_blocks(keep)))
    found: dict[str, None] = {}
    for new, old in enumerate(keep):
        theirs = dict(_values(before.get_submodule(blocks[old])))
        for name, value in _values(after.get_submodule(blocks[new])):
            was = theirs.get(name)
            counts = is_int(value) and is_int(was) and value - was == new - old
            if value != was and not counts:
                found[name] = None
    return sorted(found)


def moved_note(names: Sequence[str]) -> list[str]:
    """The sentence about them; none where there are none."""
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"Blocks that move compute otherwise: {', '.join(names[:5])}{more} follow from their position."]


def _values(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every plain value that a module of ``block`` holds, and its name inside the block."""
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and not name.startswith("_"):
                yield f"{path}.{name}".removeprefix("."), value
