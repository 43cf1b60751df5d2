"""A packed layer's state: assigned to one without memory, and with a bias that does not fit."""

from __future__ import annotations

import pytest
import torch

from compresskit.kernels.bitmap import pack
from compresskit.kernels.choice import Wish
from compresskit.modeling.sparse_linear import SparseLinear


def layer(rows: int = 12) -> SparseLinear:
    weight = torch.arange(rows * 70.0).view(rows, 70) % 3
    made = SparseLinear.of(pack(weight), torch.arange(float(rows)))
    made.settle(Wish(layout="bitmap"))
    return made


def test_a_layer_on_meta_goes_where_the_state_is_that_it_is_assigned() -> None:
    whole, x = layer(), torch.ones(2, 70)
    made = layer().to("meta")
    made.load_state_dict(whole.state_dict(), assign=True)
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"cpu"}
    made.settle(Wish(layout="bitmap"))
    assert torch.equal(made(x), whole(x))
    kept = layer().to("meta")
    kept.load_state_dict(whole.state_dict())  # copied, which nothing can be into meta
    assert {t.device.type for t in (*kept.parameters(), *kept.buffers())} == {"meta"}


def test_a_bias_of_another_shape_is_not_taken() -> None:
    made, state = layer(), layer().state_dict()
    before = made.state_dict()
    state["bias"] = torch.ones(1)  # which would be copied to all outputs
    with pytest.raises(RuntimeError, match=r"bias: expected one of \(12,\), got \(1,\)"):
        made.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
