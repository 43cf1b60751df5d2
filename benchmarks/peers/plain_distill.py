"""A plain loop over whole logits at the task of ``benchmarks.distill_peer``: what one writes by hand.

python benchmarks/peers/plain_distill.py TASK.json
"""

from __future__ import annotations

from typing import Any

import torch
from distill_task import LEARNING_RATE, MAX_GRAD_NORM, Clock, run
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM


def train(task: dict[str, Any], ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    loads: Any = AutoModelForCausalLM
    student = loads.from_pretrained(task["student"], dtype=torch.float32).train()
    teacher = loads.from_pretrained(task["teacher"], dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    clock, losses = Clock(), []
    for batch in ids:
        with torch.no_grad():
            log_p = log_softmax(teacher(batch, use_cache=False).logits[:, :-1].flatten(0, 1), -1)
        log_q = log_softmax(student(batch, use_cache=False).logits[:, :-1].flatten(0, 1), -1)
        loss = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.tick()
    return clock.seconds, losses


if __name__ == "__main__":
    run(train, ("torch", "transformers"))
