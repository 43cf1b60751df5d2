"""Documents of one length run together; nothing is padded, lost or run twice."""

from __future__ import annotations

import torch

from compresskit.calibration.rows import Batches, Documents


def row(*lengths: int, start: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.arange(start, start + sum(lengths))
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])}


def test_documents_of_one_length_share_a_batch() -> None:
    batches = Batches(Documents([row(3, 5, 3), row(3, 2, start=100)]), max_tokens=8)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 3), (1, 5), (1, 3), (1, 2)]
    seen = torch.cat([b["input_ids"].flatten() for b in batches]).sort().values
    assert torch.equal(seen, torch.cat([torch.arange(11), torch.arange(100, 105)]))
    assert batches[0]["input_ids"].tolist() == [[0, 1, 2], [8, 9, 10]]
    assert all("position_ids" not in b for b in batches)


def test_a_long_document_is_a_batch_of_its_own() -> None:
    assert [len(b["input_ids"]) for b in Batches(Documents([row(20), row(20)]), max_tokens=8)] == [1, 1]


def test_rows_with_other_inputs_stay_apart() -> None:
    shifted = {"input_ids": torch.arange(4), "position_ids": torch.arange(3, 7)}
    padded = {"input_ids": torch.arange(4), "attention_mask": torch.tensor([1, 1, 0, 0])}
    batches = Batches(Documents([row(4), shifted, padded, padded]))
    assert [(sorted(b), len(b["input_ids"])) for b in batches] == [
        (["input_ids"], 1),
        (["input_ids", "position_ids"], 1),
        (["attention_mask", "input_ids"], 2),
    ]
