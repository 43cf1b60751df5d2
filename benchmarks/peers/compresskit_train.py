"""compresskit at the tasks of ``benchmarks.training``, in one process or as a rank of a launch.

python benchmarks/peers/compresskit_train.py TASK.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distill_task import run
from in_order import trained
from torch import Tensor

from compresskit.modeling import load_model


def train(task: dict[str, Any], ids: Tensor) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    found = trained(task, load_model(Path(task["model"])), ids)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    run(train, ("torch", "transformers", "accelerate"))
