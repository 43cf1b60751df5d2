"""The same training under every engine, one after another, in the ranks of one launch.

``python every_engine.py OUT`` is one rank; RANK, WORLD_SIZE and the others are in its environment. It writes
``OUT/<engine>.json`` and ``OUT/<engine>.safetensors``. Imported, it gives the model and rows to compare with.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresskit.errors import PlanError
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.trainer import StageTrainer

STEPS = 20
DIVIDED = str(Path(__file__).with_name("divided.json"))
"""Has ZeRO-3 divide these models too: by itself it keeps parameters of fewer than 100,000 numbers whole."""
ENGINES: Mapping[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "zero1": {"strategy": "deepspeed", "zero_stage": 1},
    "zero2": {"strategy": "deepspeed", "zero_stage": 2},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3, "deepspeed_config": DIVIDED},
}
NAMES = {"ddp": "ddp", "fsdp": "fsdp"} | {f"zero{i}": f"deepspeed ZeRO-{i}" for i in (1, 2, 3)}
INT8: Mapping[str, dict[str, Any]] = {
    f"int8-{engine}": {**ENGINES[engine], "matmul": "int8"} for engine in ("ddp", "fsdp")
}
EVALUATED: dict[str, Any] = {"eval_every": 4, "keep_best": True}
BEST: Mapping[str, dict[str, Any]] = {
    f"best-{engine}": {**ENGINES[engine], **EVALUATED} for engine in ("ddp", "fsdp", "zero3")
}
SCALE = 2.0**24
"""Of losses in fp16 at the start, at which gradients overflow."""
OTHERS: Mapping[str, dict[str, Any]] = {
    name: {**ENGINES["ddp"], **changes}
    for name, changes in {
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
        "read-ahead": {"workers": 1, "prefetch": 2},
    }.items()
}
FIELDS = TrainingFields(
    steps=STEPS,
    batch_size=8,
    micro_batch_size=2,
    learning_rate=5e-3,
    checkpoint_every=0,
    weight_decay=0.1,
    max_grad_norm=0.5,
)


class Counting:
    """Rows that count upwards; rows differ in how many tokens are supervised, so ranks do too."""

    def __init__(self, by: int = 5) -> None:
        starts = torch.randint(0, 48, (40, 1), generator=torch.Generator().manual_seed(0))
        self.ids = (starts + by * torch.arange(12)) % 48

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        labels = ids.clone()
        labels[: 1 + index % 7] = -100
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(12)}


class Witnessed(Counting):
    """The same rows, which tell in a file of those that processes beside the training one have read."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self._place = place

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if torch.utils.data.get_worker_info() is not None:
            with self._place.open("a") as file:
                file.write(f"{index}\n")
        return super().__getitem__(index)


def make_model(*, tied: bool = True, layers: int = 2) -> tuple[LlamaForCausalLM, tuple[str, ...]]:
    """A tiny Llama, half of whose projections' weights are zero, and the names of those layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    held = tuple(name for name, _ in model.named_modules() if name.endswith("proj"))
    with torch.no_grad():
        for name in held:
            weight = model.get_submodule(name).weight
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    return model, held


def broken_off(start: Callable[[], TrainOutcome], step: int) -> TrainOutcome:
    """What a second start comes to, after a first that ends past ``step``, from which no rank comes back."""
    log = StageTrainer.log

    def stop(self: Any, logs: Any, *rest: Any) -> None:
        log(self, logs, *rest)
        if self.state.global_step == step:
            raise InterruptedError

    StageTrainer.log = stop  # type: ignore[method-assign]
    try:
        with suppress(InterruptedError):
            start()
    finally:
        StageTrainer.log = log  # type: ignore[method-assign]
    return start()


def main(out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=SCALE)  # type: ignore[assignment,misc]
    runs = {**ENGINES, **BEST, **OTHERS, **(INT8 if find_spec("torchao") else {})}
    for engine, changes in runs.items():
        model, held = make_model()

        def save(tensors: Mapping[str, Tensor], engine: str = engine) -> None:
            if tensors:
                save_file({k: t.clone() for k, t in tensors.items()}, out / f"{engine}.safetensors")

        fields = replace(FIELDS, **changes)
        scratch = out / engine
        outcome = Run(
            model,
            Witnessed(out / f"{engine}.txt") if fields.workers else Counting(),
            fields=fields,
            scratch=scratch,
            validation=Counting(7) if fields.keep_best else Counting(),
            held=held,
            device="cpu",
            save=save,
        ).train()
        if torch.distributed.get_rank() == 0:
            (out / f"{engine}.json").write_text(json.dumps(asdict(outcome)))
    own = out / f"apart-{torch.distributed.get_rank()}"
    try:
        Run(make_model()[0], Counting(), fields=replace(FIELDS, **ENGINES["ddp"]), scratch=own).train()
    except PlanError as error:
        own.with_suffix(".txt").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
