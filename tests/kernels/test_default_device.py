"""Torch's default device, which is the user's, has no part in packing, multiplying and choosing."""

from __future__ import annotations

import pytest
import torch

from compresskit.kernels import choice
from compresskit.kernels.bitmap import unpack
from compresskit.kernels.choice import Wish, choose
from compresskit.kernels.packed import LAYOUTS
from tests.kernels.packed_cases import draw, weight

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_stay_where_they_are_told(name: str) -> None:
    sparse, layout, x = weight((32, 64), torch.bfloat16, "2:4"), LAYOUTS[name](), draw((3, 64), 4).bfloat16()
    expected = layout.linear(x, layout.pack(sparse, CPU), None)
    with torch.device("meta"):
        packed = layout.pack(sparse, CPU)
        made, back = layout.linear(x, packed, None), layout.unpack(packed, 64)
    assert torch.equal(made, expected)
    assert torch.equal(unpack(back), unpack(sparse))


def test_layouts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_known", {})
    sparse = weight((44, 68), torch.bfloat16)  # a shape of no other test, whose times might be read
    with torch.device("meta"):
        made = choose(sparse, inputs=torch.bfloat16, device=CPU, wish=Wish(budget_s=0))
    assert {"dense", "bitmap"} <= made.times_ms.keys()
