"""A model and rows small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

Make = Callable[..., LlamaForCausalLM]


class Counting:
    """Rows that count upwards by threes; some tokens are not supervised."""

    def __init__(self, rows: int = 24, width: int = 12, vocabulary: int = 48) -> None:
        starts = torch.randint(0, vocabulary, (rows, 1), generator=torch.Generator().manual_seed(0))
        self.ids = (starts + 3 * torch.arange(width)) % vocabulary
        self.labels = self.ids.clone()
        for row in range(rows):
            self.labels[row, : 1 + row % 5] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {
            "input_ids": ids,
            "labels": self.labels[index],
            "position_ids": torch.arange(len(ids)),
        }


@pytest.fixture
def rows() -> Counting:
    return Counting()


@pytest.fixture
def make_model() -> Make:
    def make(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 48,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        } | changes
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**settings))

    return make
