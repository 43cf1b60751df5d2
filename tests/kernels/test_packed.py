"""Every registered layout keeps every bit, and multiplies as the float64 product."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compresskit.errors import PatternError
from compresskit.kernels.bitmap import VALUE_TYPES, Bitmap, pack, unpack
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Case
from compresskit.kernels.packed.bitmap import BitmapRows
from compresskit.kernels.packed.rules import INPUT_TYPES
from compresskit.kernels.packed.two_four import TwoFour
from tests.kernels.packed_cases import (
    GROUPS,
    SHAPES,
    TOKENS,
    ZEROS,
    draw,
    exact,
    inputs_of,
    tolerance,
    weight,
)

CPU = torch.device("cpu")
OURS = ("bitmap", "two_four")
"""Layouts whose op is an op of ours with two arguments around its tensors: inputs first, bias last."""


def case_of(packed: Bitmap, zeros: str, inputs: torch.dtype = torch.float32) -> Case:
    return Case(
        out_features=packed.out_features,
        in_features=packed.in_features,
        values=packed.values_K.dtype,
        inputs=inputs,
        zero_fraction=packed.zero_fraction,
        group=GROUPS[zeros],
    )


def layouts_for(case: Case) -> list[Any]:
    made = [LAYOUTS[name]() for name in LAYOUTS]
    return [layout for layout in made if not layout.refusal(case)]


def same(one: Bitmap, other: Bitmap) -> bool:
    scales = (one.scales_OG, other.scales_OG)
    return (
        torch.equal(one.mask_OB, other.mask_OB)
        and one.values_K.dtype == other.values_K.dtype
        and torch.equal(one.values_K.view(torch.uint8), other.values_K.view(torch.uint8))
        and one.in_features == other.in_features
        and (scales == (None, None) or torch.equal(*scales))
    )


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", VALUE_TYPES, ids=str)
def test_what_a_layout_packs_comes_back_to_the_bit(dtype: torch.dtype, zeros: str) -> None:
    for shape in SHAPES:
        made = weight(shape, dtype, zeros)
        kept_zeros = made.values_K.clone()
        kept_zeros[::3] = 0
        if dtype != torch.int8:
            kept_zeros[1::3] = -0.0
        for bitmap in (made, replace(made, values_K=kept_zeros)):
            layouts = layouts_for(case_of(bitmap, zeros))
            assert len(layouts) >= 2
            for layout in layouts:
                assert same(layout.unpack(layout.pack(bitmap, CPU), shape[1]), bitmap), layout


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("inputs", INPUT_TYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_TYPES, ids=str)
def test_products_are_the_exact_ones_up_to_rounding(
    dtype: torch.dtype, inputs: torch.dtype, zeros: str
) -> None:
    for number, shape in enumerate(SHAPES):
        packed = weight(shape, dtype, zeros, groups=2 if shape[1] % 2 == 0 else 1)
        bias = draw((shape[0],), 5).to(inputs) if number % 2 else None
        for layout in layouts_for(case_of(packed, zeros, inputs)):
            if layout.op == "dense_linear" and dtype != inputs:
                continue  # torch multiplies equal types: one of them is rounded
            tensors = layout.pack(packed, CPU)
            for tokens in TOKENS:
                slack = 3 if layout.op == "dense_linear" else 1
                x, *alike = inputs_of(tokens, shape[1], inputs)
                wanted, most = exact(x, packed, bias), slack * tolerance(x, packed, bias)
                for same in (x, *alike):
                    got = layout.linear(same, tensors, bias)
                    assert got.dtype == inputs
                    assert got.shape == (*same.shape[:-1], shape[0])
                    error = (got.double().view_as(wanted) - wanted).abs()
                    assert bool((error <= most).all()), (layout, shape, tokens)


def test_one_row_of_inputs_without_a_batch() -> None:
    packed = weight((5, 13), torch.float32)
    for layout in layouts_for(case_of(packed, "half")):
        x = draw((13,), 4)
        torch.testing.assert_close(layout.linear(x, layout.pack(packed, CPU), None), unpack(packed) @ x)


def test_scales_belong_to_groups_of_any_width() -> None:
    for width, groups in ((256, 2), (192, 3), (130, 13), (60, 5), (64, 64)):
        packed = weight((9, width), torch.int8, "2:4", groups)
        for layout in layouts_for(case_of(packed, "2:4")):
            tensors = layout.pack(packed, CPU)
            for tokens in (1, 5, 65):
                x = draw((tokens, width), 4)
                error = (layout.linear(x, tensors, None).double() - exact(x, packed, None)).abs()
                assert bool((error <= tolerance(x, packed, None)).all()), (layout, width, groups)


def op_of(name: str, packed: Bitmap) -> tuple[Any, tuple[Tensor, ...]]:
    layout = LAYOUTS[name]()
    return getattr(torch.ops.compresskit, layout.op), layout.pack(packed, CPU)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(7, 130), (16, 64)])
def test_ops_are_what_torch_expects_of_an_op(name: str, shape: tuple[int, int]) -> None:
    op, tensors = op_of(name, weight(shape, torch.float32, "2:4"))
    for x in (draw((3, shape[1]), 4), draw((2, 3, shape[1]), 4).requires_grad_()):
        bias = draw((shape[0],), 5).requires_grad_(x.requires_grad)
        torch.library.opcheck(op.default, (x, *tensors, bias))
    expand = getattr(torch.ops.compresskit, f"{name}_expand")
    torch.library.opcheck(expand.default, (*tensors, shape[1], torch.bfloat16))


@pytest.mark.parametrize("name", OURS)
def test_gradients_of_inputs_and_bias(name: str) -> None:
    packed = weight((6, 20), torch.float32, "2:4")
    op, tensors = op_of(name, packed)
    x, bias = draw((3, 20), 4).double().requires_grad_(), draw((6,), 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: op(x, *tensors, bias), (x, bias))
    for dtype in INPUT_TYPES:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (x, bias)]
        grad = draw((3, 6), 6).to(dtype)
        got = torch.autograd.grad(op(leaves[0], *tensors, leaves[1]), leaves, grad)
        expected = (grad.double() @ unpack(packed).double(), grad.double().sum(0))
        for mine, true in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=8 * torch.finfo(dtype).eps, atol=0.05)


@pytest.mark.parametrize("name", OURS)
def test_a_compiled_model_runs_the_op(name: str) -> None:
    op, tensors = op_of(name, weight((16, 64), torch.float32, "2:4"))

    def layer(x: Tensor) -> Tensor:
        return torch.relu(op(x, *tensors, None)) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = draw((3, 64), 4).requires_grad_()
        assert torch.equal(compiled(x), layer(x))
        compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", OURS)
def test_inputs_of_another_width_are_refused(name: str) -> None:
    op, tensors = op_of(name, weight((16, 130), torch.float32, "2:4"))
    with pytest.raises(ValueError, match="the weight has 129 to 192 inputs, the inputs 64"):
        op(draw((3, 64), 4), *tensors, None)


def test_layouts_say_why_they_refuse() -> None:
    case = case_of(weight((4, 8), torch.float32), "half")
    bitmap, two_four = BitmapRows(), TwoFour()
    assert bitmap.refusal(replace(case, inputs=torch.float64)) == (
        "inputs are float64, not one of float32, bfloat16, float16"
    )
    assert "values are int16" in bitmap.refusal(replace(case, values=torch.int16))
    assert "nothing says" in two_four.refusal(case)
    assert "of 8 consecutive inputs 4 are kept" in two_four.refusal(replace(case, group=(4, 8)))
    for group in ((2, 4), (1, 4), (1, 2), (2, 8)):
        assert two_four.refusal(replace(case, group=group)) == ""
    with pytest.raises(
        PatternError, match="two kept weights of every four at most, got 4 in group 0 of row 0"
    ):
        two_four.pack(weight((4, 8), torch.float32, "none"), CPU)


def test_two_four_lies_as_its_docstring_says() -> None:
    dense = torch.tensor([[0, 5, 0, 7], [0, 0, 3, 0], [0, 0, 0, 9], [0, 0, 0, 0]]).float().reshape(1, 16)
    values, places, _ = TwoFour().pack(pack(dense), CPU)
    assert values.shape == (32 + 64 // 4,)
    assert values[:8].tolist() == [5, 7, 3, 0, 0, 9, 0, 0]
    wanted = [(1, 3), (2, 2), (3, 3), (1, 0)]
    assert [(int(places[0, 0]) >> 4 * g & 3, int(places[0, 0]) >> 4 * g + 2 & 3) for g in range(4)] == wanted
