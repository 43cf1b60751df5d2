"""What computes something else for a while computes what it did afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compresskit.modeling.forwards import computing


def test_forwards_are_put_back_whatever_happens() -> None:
    plain, own = nn.Linear(2, 2), nn.Linear(2, 2)
    own.forward = lambda x: x + 1  # type: ignore[method-assign]
    mine, x = own.forward, torch.ones(2)
    replaced = [(plain, lambda x: x * 2), (own, lambda x: x * 3), (plain, lambda x: x * 4)]

    def fail() -> None:
        with computing(replaced):
            assert torch.equal(plain(x), x * 4), "of a module named twice the last counts"
            assert torch.equal(own(x), x * 3)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert "forward" not in vars(plain)
    assert own.forward is mine
