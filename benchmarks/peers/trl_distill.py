"""TRL's GKD trainer, off-policy, at the task of ``benchmarks.distill_peer``; in an environment of its own.

PEER-PYTHON benchmarks/peers/trl_distill.py TASK.json
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from distill_task import LEARNING_RATE, MAX_GRAD_NORM, Clock, run
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class InOrder(GKDTrainer):  # type: ignore[misc]
    """Reads the rows as they lie, as the other side does."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Ticking(TrainerCallback):  # type: ignore[misc]
    """Ticks a clock after each step and keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.tick()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def stack(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch; every token but the first of a row is learnt."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    mask = torch.ones_like(ids)
    prompts = {"prompts": ids[:, :1], "prompt_attention_mask": mask[:, :1]}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, **prompts}


def train(task: dict[str, Any], ids: torch.Tensor) -> tuple[list[float], list[float]]:
    """Seconds and loss of each step."""
    steps, batch, _ = ids.shape
    tokenizer = AutoTokenizer.from_pretrained(task["student"])
    tokenizer.pad_token = tokenizer.eos_token
    ticking = Ticking()
    with tempfile.TemporaryDirectory() as out:
        arguments = GKDConfig(
            output_dir=out,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            weight_decay=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = InOrder(
            model=AutoModelForCausalLM.from_pretrained(task["student"], dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(task["teacher"], dtype=torch.float32),
            args=arguments,
            data_collator=stack,
            train_dataset=Dataset.from_list([{"input_ids": row} for row in ids.flatten(0, 1).tolist()]),
            processing_class=tokenizer,
            callbacks=[ticking],
        )
        trainer.train()
    return ticking.clock.seconds, ticking.losses


if __name__ == "__main__":
    run(train, ("trl", "torch", "transformers", "accelerate"))
