"""compresskit at the task of ``benchmarks.distill_peer``: the training that ``compresskit distill`` does.

python benchmarks/peers/compresskit_distill.py TASK.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill_task import run
from in_order import trained
from torch import Tensor

from compresskit.distill.divergences import Divergences
from compresskit.distill.teacher import Replica
from compresskit.modeling import load_model


def train(task: dict[str, Any], ids: Tensor) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    model = load_model(Path(task["student"]))
    teacher = Replica(directory=task["teacher"], vocabulary=model.config.vocab_size)
    teacher.load()
    return trained(task, model, ids, objective=Divergences(), teacher=teacher)


if __name__ == "__main__":
    run(train, ("torch", "transformers", "accelerate"))
