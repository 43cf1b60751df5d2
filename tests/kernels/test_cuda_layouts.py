"""CUDA's layouts keep every bit; their launchers and kernels, played on the CPU, give the exact product."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.errors import PatternError
from compresskit.kernels import dispatch, triton
from compresskit.kernels.bitmap import Bitmap, pack
from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.launch import Machine
from compresskit.kernels.packed import LAYOUTS
from compresskit.kernels.packed.base import Case
from compresskit.registry import locate
from tests.kernels.lanes import ADA, HOPPER, SMALL, gpu, starter

__all__ = ["gpu"]
CPU = torch.device("cpu")
NAMES = ("fragment", "gap", "tile")
ALL = (*NAMES, "block")
FLOAT16 = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 8), (5, 13), (16, 64), (7, 130), (33, 200), (40, 1090)]
TWO_FOUR = ("fragment",)


def whole(shape: tuple[int, ...], most: int, seed: int) -> Tensor:
    """Small whole numbers, whose sums are exact in any order."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed))


def weight_of(name: str, shape: tuple[int, int], dtype: torch.dtype, zeros: str = "half") -> Tensor:
    """``rows``: empty rows beside full ones; ``far``: long runs of zeros."""
    made = whole(shape, 4, 1)
    score = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    if name in TWO_FOUR:
        groups = pad(score, (0, -shape[1] % 4)).unflatten(1, (-1, 4))
        counts = whole((*groups.shape[:2], 1), 1, 3) + 1
        keep = (groups.argsort(-1).argsort(-1) < counts).flatten(1)[:, : shape[1]]
    elif zeros == "rows":
        keep = (torch.arange(shape[0]) % 2 == 0)[:, None].expand(shape)
    else:
        keep = score < {"half": 0.5, "far": 0.02, "none": 1.0}[zeros]
    return torch.where(keep, made, 0).to(dtype)


def case(name: str, **changes: Any) -> Case:
    plain = Case(
        out_features=16,
        in_features=64,
        values=torch.bfloat16,
        inputs=torch.bfloat16,
        zero_fraction=0.6,
        group=(2, 4) if name in TWO_FOUR else None,
        device="cuda",
    )
    return replace(plain, **changes)


@pytest.mark.parametrize("dtype", FLOAT16, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_what_a_layout_packs_comes_back(name: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]()
    for shape in SHAPES:
        for zeros in ("half", "rows", "far", "none"):
            dense = weight_of(name, shape, dtype, zeros)
            bitmap = pack(dense)
            bitmap.values_K[::3] = 0.0
            back = layout.unpack(layout.pack(bitmap, CPU), shape[1])
            assert torch.equal(back.mask_OB, bitmap.mask_OB), (shape, zeros)
            assert torch.equal(back.values_K.view(torch.int16), bitmap.values_K.view(torch.int16))
            assert not back.faults("weight")


@pytest.mark.parametrize("name", ALL)
def test_a_kept_negative_zero_stays_kept(name: str) -> None:
    bitmap = Bitmap(
        mask_OB=torch.ones(1, 1, dtype=torch.uint8), values_K=torch.tensor([-0.0]).half(), in_features=5
    )
    back = LAYOUTS[name]().unpack(LAYOUTS[name]().pack(bitmap, CPU), 5)
    assert torch.equal(back.mask_OB, bitmap.mask_OB)


def test_more_than_two_of_four_are_refused() -> None:
    with pytest.raises(
        PatternError, match="two kept weights of every four at most, got 4 in group 1 of row 0"
    ):
        LAYOUTS["fragment"]().pack(pack(torch.tensor([[1, 0, 0, 0, 1, 1, 1, 1]]).half()), CPU)


def product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    exact = x.double() @ dense.double().T
    return (exact if bias is None else exact + bias.double()).to(x.dtype)


def check(name: str, implementation: str, tokens: tuple[int, ...], dtype: torch.dtype, **how: Any) -> None:
    layout = LAYOUTS[name]()
    run = locate(f"compresskit.kernels.{implementation}.{layout.op}:{layout.op}")
    for shape in how.get("shapes", SHAPES):
        dense = weight_of(name, shape, dtype, how.get("zeros", "half"))
        packed = layout.pack(pack(dense), CPU)
        for count in tokens:
            x = whole((count, shape[1]), 3, count).to(dtype)
            bias = whole((shape[0],), 3, 5).to(dtype) if count % 2 else None
            assert torch.equal(run(x, *packed, bias), product(x, dense, bias)), (shape, count)


@pytest.mark.parametrize("dtype", FLOAT16, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_reference_multiplies(name: str, dtype: torch.dtype) -> None:
    for zeros in ("half", "rows", "far", "none"):
        check(name, "reference", (0, 1, 3, 70), dtype, zeros=zeros)


PLAYED = {
    "fragment": [(1, 3), (8, 9), (16, 30), (64,)],
    "gap": [(1,), (2, 5)],
    "tile": [(1, 3), (8, 9), (16,)],
}


@pytest.mark.parametrize(
    ("name", "tokens"), [(name, tokens) for name, cases in PLAYED.items() for tokens in cases]
)
def test_a_kernel_played_lane_by_lane_gives_the_exact_product(
    gpu: Machine, name: str, tokens: tuple[int, ...]
) -> None:
    check(name, "cuda", tokens, torch.bfloat16, shapes=[(1, 1), (33, 200), (40, 1090)])
    check(name, "cuda", tokens[-1:], torch.bfloat16, shapes=[(50, 2300), (3, 496)])
    if name not in TWO_FOUR:
        for zeros in ("rows", "far", "none")[: 2 if gpu is SMALL else 3]:
            check(name, "cuda", tokens[:1], torch.bfloat16, shapes=[(7, 530)], zeros=zeros)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_played_in_fp16_and_on_odd_memory(gpu: Machine, name: str) -> None:
    check(name, "cuda", (0, 2), torch.float16, shapes=[(3, 8), (7, 130)])
    layout = LAYOUTS[name]()
    dense = weight_of(name, (5, 13), torch.float16)
    packed = layout.pack(pack(dense), CPU)
    run = locate(f"compresskit.kernels.cuda.{layout.op}:{layout.op}")
    plain = whole((2, 3, 13), 3, 1).half()
    strided = torch.empty(13, 3, 2, dtype=torch.float16).permute(2, 1, 0).copy_(plain)
    shifted = torch.empty(79, dtype=torch.float16)[1:].view(2, 3, 13).copy_(plain)
    for x in (plain, strided, shifted, plain[0, 0]):
        assert torch.equal(
            run(x, *packed, None), product(x.reshape(-1, 13), dense, None).view(*x.shape[:-1], 5)
        )


def op_of(name: str, shape: tuple[int, int]) -> tuple[Any, tuple[Tensor, ...], Tensor]:
    layout, dense = LAYOUTS[name](), weight_of(name, shape, torch.bfloat16)
    return getattr(torch.ops.compresskit, layout.op), layout.pack(pack(dense), CPU), dense


@pytest.mark.parametrize("name", ALL)
def test_ops_are_what_torch_expects_of_an_op(name: str) -> None:
    op, tensors, _ = op_of(name, (7, 130))
    for x in (whole((3, 130), 3, 4).float(), whole((2, 3, 130), 3, 4).float().requires_grad_()):
        bias = whole((7,), 3, 5).float().requires_grad_(x.requires_grad)
        torch.library.opcheck(op.default, (x, *tensors, bias))
    expand = getattr(torch.ops.compresskit, f"{name}_expand")
    torch.library.opcheck(expand.default, (*tensors, 130, torch.bfloat16))


@pytest.mark.parametrize("name", ALL)
def test_gradients_compiled_models_and_widths(name: str) -> None:
    op, tensors, dense = op_of(name, (6, 20))
    x, bias = whole((3, 20), 3, 4).double().requires_grad_(), whole((6,), 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: op(x, *tensors, bias), (x, bias))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(lambda x: op(x, *tensors, None) + 1, fullgraph=True, backend="aot_eager")
        leaf = x.detach().bfloat16().requires_grad_()
        compiled(leaf).sum().backward()
    assert torch.equal(leaf.grad, dense.sum(0).expand(3, 20))
    with pytest.raises(ValueError, match="the inputs 200"):
        op(whole((3, 200), 3, 4).bfloat16(), *tensors, None)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_say_why_they_refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[name]()
    said = {
        "it is made for CUDA's kernels, and the device is cpu": case(name, device="cpu"),
        "values are float32, not bfloat16 or float16": case(name, values=torch.float32),
        "inputs are float16, the values bfloat16": case(name, inputs=torch.float16),
    }
    for phrase, refused in said.items():
        assert layout.refusal(refused) == phrase
    monkeypatch.setattr(launch, "unavailable", lambda: "the GPU is sm_75")
    dispatch.refusal.cache_clear()
    assert layout.refusal(case(name)) == "the GPU is sm_75"
    monkeypatch.setattr(launch, "unavailable", lambda: "")
    monkeypatch.setattr(launch, "machine", lambda index: HOPPER)
    dispatch.refusal.cache_clear()
    assert layout.refusal(case(name)) == ""
    dispatch.refusal.cache_clear()


def test_a_2_4_layout_must_know_the_pattern() -> None:
    layout = LAYOUTS["fragment"]()
    assert "nothing says" in layout.refusal(case("fragment", group=None))
    assert "of 8 consecutive inputs 4 are kept" in layout.refusal(case("fragment", group=(4, 8)))


@pytest.mark.parametrize("dtype", FLOAT16, ids=str)
def test_many_tokens_make_the_weight_dense(gpu: Machine, dtype: torch.dtype) -> None:
    from compresskit.kernels.cuda.tile_expand import tile_expand

    for shape, zeros in (((1, 1), "half"), ((33, 200), "rows"), ((40, 1090), "half"), ((7, 530), "far")):
        dense = weight_of("tile", shape, dtype, zeros)
        packed = LAYOUTS["tile"]().pack(pack(dense), CPU)
        assert torch.equal(tile_expand(*packed, shape[1], torch.float32), dense.float())
    check("tile", "cuda", (17, 70), dtype, shapes=[(33, 200)])


def test_a_weight_without_zeros_still_fits_a_small_gpu(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "machine", lambda index: ADA)
    monkeypatch.setattr(launch, "start", starter(ADA))
    check("tile", "cuda", (16, 17), torch.bfloat16, shapes=[(7, 530)], zeros="none")


@pytest.mark.parametrize("name", NAMES)
def test_types_that_no_kernel_multiplies_are_refused(name: str) -> None:
    layout = LAYOUTS[name]()
    packed = layout.pack(pack(weight_of(name, (3, 8), torch.float16)), CPU)
    run = locate(f"compresskit.kernels.cuda.{layout.op}:{layout.op}")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="both must be bf16 or fp16"):
            run(torch.ones(1, 8, dtype=dtype), *packed, None)


def test_gap_is_for_few_tokens_and_inputs_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["gap"]()
    assert layout.refusal(case("gap", tokens=5)) == "it is made for 4 tokens at most, not 5"
    monkeypatch.setattr(launch, "unavailable", lambda: "")
    monkeypatch.setattr(launch, "machine", lambda index: HOPPER)
    dispatch.refusal.cache_clear()
    assert layout.refusal(case("gap", in_features=28672)) == ""
    assert layout.refusal(case("gap", in_features=60000)) == (
        "60000 inputs take 241664 bytes of shared memory, of 232448"
    )
    dispatch.refusal.cache_clear()


def test_gaps_lie_as_the_docstring_says() -> None:
    dense = torch.zeros(2, 64)
    dense[1, [0, 2, 40]] = torch.tensor([5.0, 6, 7])
    values, gaps, starts, _ = LAYOUTS["gap"]().pack(pack(dense.half()), CPU)
    assert starts.tolist() == [0, 0, 1]
    assert values.tolist() == [[5, 6, 0, 0, 7, 0, 0, 0]]
    assert [int(gaps[0]) >> 8 * i & 15 for i in range(4)] == [0, 1, 15, 15]
    assert [int(gaps[0]) >> 8 * i + 4 & 15 for i in range(4)] == [5, 0, 0, 0]


def test_a_kernel_is_given_whole_tensors_of_one_device() -> None:
    for tensors in ([torch.ones(2), torch.ones(2, device="meta")], [torch.ones(3, 2).t()]):
        with pytest.raises(ValueError, match="gap_linear: contiguous tensors on one device"):
            launch.start("gap_linear", {}, (1, 1), 32, 0, tensors)


def test_block_is_for_zeros_that_fill_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["block"]()
    assert layout.refusal(case("block")) == "nothing says that zeros fill blocks"
    assert "no multiple of 16x16" in layout.refusal(case("block", block=(8, 16)))
    assert "the device is cpu" in layout.refusal(case("block", block=(16, 32), device="cpu"))
    assert "int8" in layout.refusal(case("block", block=(16, 32), values=torch.int8))
    monkeypatch.setattr(triton, "refusal", lambda op: "triton is not installed")
    dispatch.refusal.cache_clear()
    assert layout.refusal(case("block", block=(16, 16))) == "triton is not installed"
    dispatch.refusal.cache_clear()
    dense = torch.zeros(20, 70)
    dense[17, 33] = 5
    values, columns, starts, extents = layout.pack(pack(dense), CPU)
    assert values.shape == (1, 16, 16)
    assert (values[0, 1, 1], columns.tolist(), starts.tolist()) == (5, [2], [0, 0, 1])
    assert extents.shape == (20, 5, 0)


def test_a_kernel_that_cannot_be_had_is_passed_over_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch.refusal.cache_clear()
    dispatch.forget()
    monkeypatch.setattr(launch, "unavailable", lambda: "the GPU is sm_75")
    with pytest.warns(UserWarning, match="fragment_linear does without its cuda implementation.*sm_75"):
        assert dispatch.choose("fragment_linear", "cuda") == "reference"
    assert "sm_75" in dispatch.passed_over()[0]
    dispatch.refusal.cache_clear()
    dispatch.forget()
