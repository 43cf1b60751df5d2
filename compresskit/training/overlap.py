"""Exchange what processes have to exchange while they compute.

* DDP (Li et al. 2020) adds up gradients a bucket at a time, as soon as the backward pass has filled it.
* FSDP2 gathers the next block's weights while a block computes: on a GPU in a stream of its own, which only
  needs to be told early; on a CPU as an operation that is waited for when its result is needed.
* ZeRO has ``overlap_comm`` (see ``compresskit.training.deepspeed``): streams of its own on a GPU; on a CPU
  DeepSpeed has no streams, takes the same road and overlaps nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from compresskit.training.setting import Setting

ONE_BUCKET_MB = 1 << 20
"""More than any model's gradients: they are added up at the end of the backward pass, all at once."""


def bucket_arguments(setting: Setting) -> dict[str, Any]:
    """The part of TrainingArguments that sizes DDP's buckets; torch's own sizes where they may overlap."""
    return {} if setting.fields.overlap else {"ddp_bucket_cap_mb": ONE_BUCKET_MB}


def share_buckets(accelerator: Any) -> None:
    """Have gradients be views of DDP's buckets: no copy between the two, and no second set in memory."""
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True


def prefetch_blocks(setting: Setting, model: nn.Module) -> None:
    """Have each block that FSDP2 shards gather the next one's weights before it computes.

    In the backward pass FSDP2 does so by itself. No more than two blocks are whole at a time.

    Args:
        setting: of the run.
        model: prepared; under any other engine nothing is done.
    """
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            _prefetch([block for block in blocks if isinstance(block, FSDPModule)], setting.device)


def _prefetch(blocks: list[Any], device: str) -> None:
    """Have each of ``blocks`` but the last gather the one that follows it."""
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
    if device == "cpu":
        for block in blocks:
            block._set_unshard_async_op(True)
