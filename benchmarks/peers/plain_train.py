"""A plain loop at the tasks of ``benchmarks.training``, with DistributedDataParallel as a rank of a launch.

python benchmarks/peers/plain_train.py TASK.json
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from distill_task import LEARNING_RATE, MAX_GRAD_NORM, Clock, run
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM


def train(task: dict[str, Any], ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    loads: Any = AutoModelForCausalLM
    model = loads.from_pretrained(task["model"], dtype=torch.float32).train()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        ids = ids.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    clock, losses = Clock(), []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
        mean = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    if dist.is_initialized():
        dist.destroy_process_group()
    return clock.seconds, losses


if __name__ == "__main__":
    run(train, ("torch", "transformers"))
