"""A tiny model, prompt rows, and an adaptation with defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor, nn

from compresskit.modeling import ModelSource
from compresskit.training.adapters.adaptation import Adapted
from compresskit.training.fields import TrainingFields
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

FIELDS = TrainingFields(steps=10, batch_size=8, learning_rate=1e-2, checkpoint_every=0)


class Rows:
    """Two documents of counting bytes in each row."""

    def __init__(self, rows: int = 24, width: int = 16) -> None:
        starts = torch.randint(0, 200, (rows, 2, 1), generator=torch.Generator().manual_seed(0))
        self.ids = ((starts + 3 * torch.arange(width // 2)) % 200).reshape(rows, width)
        self.positions = torch.arange(width // 2).repeat(2)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids, "position_ids": self.positions}


@dataclass
class Trained:
    """What one training came to."""

    adapted: Adapted
    source: ModelSource
    model: nn.Module
    outcome: TrainOutcome
    before: Mapping[str, Tensor]
    out: Path


Train = Callable[..., Trained]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return ModelSource(tiny_llama(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, dense: ModelSource) -> ModelSource:
    """Every other projection 2:4, the others with half of their weights gone anywhere."""
    place = tiny_llama(tmp_path_factory.mktemp("pruned"))
    tensors = load_file(place / "model.safetensors")
    for index, name in enumerate(n for n in sorted(tensors) if "proj" in n):
        weight = tensors[name]
        if index % 2:
            groups = weight.reshape(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
        else:
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(index)) < 0.5] = 0
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return ModelSource(place)


def projections(source: ModelSource) -> tuple[str, ...]:
    return tuple(name for name in source.anatomy.linears if name.endswith("proj"))


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def run(
        source: ModelSource,
        *,
        fields: TrainingFields = FIELDS,
        out: str = "out",
        resume_scratch: Path | None = None,
        **changes: Any,
    ) -> Trained:
        settings: dict[str, Any] = {
            "adapter": "lora",
            "rank": 4,
            "alpha": 8.0,
            "dropout": 0.0,
            "base": "nf4",
            "loftq_rounds": 0,
            "finish": "merge",
            "merge_into": "trained",
            "targets": projections(source),
            "held": (),
            "precision": "fp32",
            "seed": 0,
        } | changes
        adapted = Adapted(**settings)
        model = adapted.load(source)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        (tmp_path / out).mkdir()
        outcome = Run(
            model,
            Rows(),
            fields=fields,
            scratch=resume_scratch or tmp_path / f"{out}-scratch",
            saves_frozen=False,
            device="cpu",
            save=lambda tensors: adapted.save(source, tmp_path / out, tensors),
        ).train()
        return Trained(adapted, source, model, outcome, before, tmp_path / out)

    return run
