"""A weight with zeros, in the least words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compresskit.kernels.bitmap import VALUE_TYPES, Bitmap, pack, pieces, unpack

SHAPES = [(1, 1), (3, 8), (5, 13), (16, 64), (7, 130)]


def sparse(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    dense = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(1))
    return torch.where(dense % 3 == 0, dense, 0).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", VALUE_TYPES)
def test_what_is_packed_comes_back_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = sparse(shape, dtype)
    scales = torch.ones(shape[0], 1) if dtype == torch.int8 else None
    packed = pack(weight, scales)
    assert not packed.faults("layer")
    assert torch.equal(unpack(packed, dtype), weight)
    assert packed.values_K.numel() == int((weight != 0).sum())
    assert packed.zero_fraction == pytest.approx(float((weight == 0).double().mean()))


def test_the_bits_lie_as_the_docstring_says() -> None:
    weight = sparse((4, 19), torch.float32)
    mask = pack(weight).mask_OB
    for o, i in torch.cartesian_prod(torch.arange(4), torch.arange(19)).tolist():
        assert bool(int(mask[o, i // 8]) >> (i % 8) & 1) == bool(weight[o, i] != 0)


def test_int8_values_are_multiplied_by_the_scale_of_their_group() -> None:
    weight, scales = sparse((3, 12), torch.int8), torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    expected = torch.stack(
        [torch.stack([weight[o, i] * scales[o, i // 4] for i in range(12)]) for o in range(3)]
    )
    assert torch.equal(unpack(pack(weight, scales)), expected)


@pytest.mark.parametrize("weights", [1, 30, 100, 10**6])
@pytest.mark.parametrize("rows", [1, 7, 12])
def test_pieces_are_the_weight_row_by_row(rows: int, weights: int) -> None:
    integers = (sparse((rows, 10), torch.float32) * 9).to(torch.int8)
    whole = pack(integers, torch.rand(rows, 2))
    parts = list(pieces(whole, weights))
    assert [part.out_features for part in parts[:-1]] == [max(1, weights // 10)] * (len(parts) - 1)
    assert all(not part.faults("a piece") for part in parts)
    assert torch.equal(torch.cat(list(map(unpack, parts))), unpack(whole))
    assert torch.equal(unpack(whole), integers * whole.scales_OG.repeat_interleave(5, 1))  # type: ignore[union-attr]


WHOLE = pack(sparse((5, 13), torch.float32))
EIGHT = pack(sparse((4, 12), torch.int8), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (replace(WHOLE, values_K=WHOLE.values_K[:-1]), "a value for each of"),
        (replace(WHOLE, mask_OB=WHOLE.mask_OB | 128), "no kept weight past input 13"),
        (replace(WHOLE, mask_OB=WHOLE.mask_OB[:, :1]), "uint8 of (outputs, 2)"),
        (replace(WHOLE, mask_OB=WHOLE.mask_OB.int()), "uint8 of (outputs, 2)"),
        (replace(WHOLE, values_K=WHOLE.values_K.double()), "one row of float32"),
        (replace(WHOLE, values_K=WHOLE.values_K * torch.nan), "finite numbers"),
        (replace(WHOLE, scales_OG=torch.ones(5, 1)), "and only there"),
        (replace(EIGHT, mask_OB=torch.tensor(1, dtype=torch.uint8)), "uint8 of (outputs, 2)"),
        (replace(EIGHT, scales_OG=None), "scales beside int8 values"),
        (replace(EIGHT, scales_OG=torch.ones(4, 5)), "a divisor of 12"),
        (replace(EIGHT, scales_OG=torch.full((4, 3), torch.inf)), "finite numbers"),
    ],
)
def test_parts_that_contradict_each_other_are_told(broken: Bitmap, told: str) -> None:
    faults = broken.faults("model.layers.0")
    assert any(told in str(fault) for fault in faults), faults
    assert all(fault.where.startswith("model.layers.0") for fault in faults)
