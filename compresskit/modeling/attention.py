"""The queries, keys and values of a block, caught where transformers hands them to its attention function.

No list of layers' names: whatever makes them, and whether one layer makes all three, they pass there, turned
by their positions where a model turns them.

Shapes: B = rows, T = tokens of a row, H = heads (of keys and values there may be fewer), W = width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Attended(NamedTuple):
    """What the attention of one block multiplies, each (B, T, H, W)."""

    queries: Tensor
    keys: Tensor
    values: Tensor


@contextmanager
def attending(blocks: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Attended]]:
    """Within, what the attention of each block was given is in the mapping once it ran: views, no copies.

    A block without attention is not in it; of several in a block it is the first. What a backward pass
    computes once more after this ended is not kept.
    """
    kept: dict[nn.Module, Attended] = {}
    owner = {id(part): block for block in blocks for part in block.modules()}
    find = ALL_ATTENTION_FUNCTIONS.get_interface

    def watched(implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attend = find(implementation, default)

        def keep(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            block = owner.get(id(module))
            if block is not None and block not in kept:
                kept[block] = Attended(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return attend(module, q, k, v, *args, **kwargs)

        return keep

    ALL_ATTENTION_FUNCTIONS.get_interface = watched  # type: ignore[method-assign, assignment]
    try:
        yield kept
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def attended_shapes(model: nn.Module, blocks: Iterable[str]) -> dict[str, tuple[torch.Size, ...]]:
    """The shapes of the queries, keys and values of each of ``blocks`` that has attention, for one token.

    Args:
        model: a skeleton on the meta device.
        blocks: names of its blocks.

    Returns:
        None where the model cannot be run on token ids alone.
    """
    base: Any = getattr(model, "base_model", model)
    named = {model.get_submodule(name): name for name in blocks}
    try:
        with torch.no_grad(), attending(named) as kept:
            base(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"))
    except Exception:  # whatever a model's own code raises over inputs that nobody meant for it
        return {}
    return {named[block]: tuple(tensor.shape for tensor in found) for block, found in kept.items()}
