"""Prefixes on packed rows: what a token sees, and that peft computes the same for a document alone."""

from __future__ import annotations

import pytest
import torch
from conftest import Train
from peft import PeftModel

from compresskit.modeling import ModelSource, load_model
from compresskit.training.adapters.prefix import visible

# peft asks transformers by an old name; compresskit.training.adapters.attach says the same.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def test_a_token_sees_the_prefix_and_its_own_document_so_far() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    seen = visible(positions, 2)
    document = [[0, 0, 0, 1, 1], [0] * 5]
    for row in range(2):
        for t in range(5):
            for k in range(7):
                expected = k < 2 or (k - 2 <= t and document[row][k - 2] == document[row][t])
                assert bool(seen[row, 0, t, k]) == expected


def test_each_document_of_a_row_gets_what_peft_gives_it_alone(dense: ModelSource, train: Train) -> None:
    done = train(dense, adapter="prefix", finish="adapter", base="none")
    model = done.model.eval()
    ids = torch.randint(0, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(5), *range(7)]])
    with torch.no_grad():
        packed = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        tuned = PeftModel.from_pretrained(load_model(dense), done.out / "adapter").eval()
        for part in (slice(0, 5), slice(5, 12)):
            alone = tuned(input_ids=ids[:, part], output_hidden_states=True).hidden_states[-1]
            torch.testing.assert_close(packed[:, part], alone, rtol=1e-4, atol=1e-5)
