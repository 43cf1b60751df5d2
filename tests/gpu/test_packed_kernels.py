"""CUDA kernels and twins in Triton on a GPU: against float64, on fresh numbers, into memory that held NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from compresskit.kernels import dispatch, triton
from compresskit.kernels.bitmap import Bitmap, pack_bits
from compresskit.kernels.cuda import launch
from compresskit.kernels.cuda.tile_expand import tile_expand
from compresskit.kernels.packed import LAYOUTS

WHY_NOT = launch.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "a GPU is here")]
NAMES = ("fragment", "gap", "tile")
TWINS = ("bitmap", "two_four", "block")
TWO_FOUR = ("fragment", "two_four")
FLOAT16 = (torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 8), (5, 13), (16, 64), (33, 200), (130, 1090), (1000, 4099), (4096, 4096), (512, 14336)]
TOKENS = (0, *range(1, 18), 31, 33, 63, 64, 65, 130)


@pytest.fixture(autouse=True)
def fresh_numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another seed in every run, said where a test fails; new memory holds NaN."""
    seed = torch.seed()
    print(f"seed {seed}")
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(name: str, shape: tuple[int, int], dtype: torch.dtype, kept: float = 0.4) -> Tensor:
    score = torch.rand(shape, device="cuda")
    if name in TWO_FOUR:
        groups = pad(score, (0, -shape[1] % 4)).unflatten(1, (-1, 4))
        counts = torch.randint(0, 3, (*groups.shape[:2], 1), device="cuda")
        keep = (groups.argsort(-1).argsort(-1) < counts).flatten(1)[:, : shape[1]]
    else:
        keep = score < kept
    return torch.where(keep, torch.randn(shape, device="cuda") / shape[1] ** 0.5, 0).to(dtype)


def packed(name: str, weight: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    keep = weight != 0
    bitmap = Bitmap(mask_OB=pack_bits(keep), values_K=weight[keep], in_features=weight.shape[1])
    layout = LAYOUTS[name]()
    return layout, layout.pack(bitmap, torch.device("cuda"))


def assert_right(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within three times what torch errs in fp32, rounded, and a unit of the type."""
    true = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    plain = (x.float() @ weight.float().T + (0 if bias is None else bias.float())).to(x.dtype)
    slack = 3 * (plain.double() - true).abs().amax() if true.numel() else 0
    assert bool(((got.double() - true).abs() <= slack + torch.finfo(x.dtype).eps * true.abs()).all())


@pytest.mark.parametrize("dtype", FLOAT16, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_products_of_every_batch(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(name, shape, dtype)
    layout, tensors = packed(name, weight)
    dispatch.forget()
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        bias = torch.randn(shape[0], device="cuda").to(dtype) if tokens % 2 else None
        got = layout.linear(x, tensors, bias)
        assert_right(got, x, weight, bias)
        assert torch.equal(got, layout.linear(x, tensors, bias)), "not the same bits twice"
    assert dispatch.used()[layout.op] == "cuda"


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", ["gap", "tile"])
def test_few_zeros_and_many(name: str, kept: float) -> None:
    weight = weight_of(name, (333, 2050), torch.bfloat16, kept)
    layout, tensors = packed(name, weight)
    for tokens in (1, 2, 7, 16):
        x = torch.randn(tokens, 2050, device="cuda").bfloat16()
        assert_right(layout.linear(x, tensors, None), x, weight, None)


@pytest.mark.skipif(bool(triton.refusal("")), reason=triton.refusal("") or "triton is here")
@pytest.mark.parametrize("dtype", [*FLOAT16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_twins_in_triton(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:7]:
        weight = weight_of(name, shape, dtype)
        if name == "block":
            weight *= (torch.arange(shape[1], device="cuda") // 16 % 3 == 0).to(dtype)
        layout, tensors = packed(name, weight)
        dispatch.forget()
        for tokens in (0, 1, 2, 16, 33):
            x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
            bias = torch.randn(shape[0], device="cuda").to(dtype) if tokens % 2 else None
            assert_right(layout.linear(x, tensors, bias), x, weight, bias)
        assert dispatch.used()[layout.op] == "triton"


@pytest.mark.parametrize("name", NAMES)
def test_layouts_come_back_from_the_gpu(name: str) -> None:
    weight = weight_of(name, (130, 1090), torch.bfloat16)
    layout, tensors = packed(name, weight)
    back = layout.unpack(tensors, 1090)
    assert torch.equal(back.mask_OB, pack_bits(weight != 0).cpu())
    assert torch.equal(back.values_K, weight[weight != 0].cpu())


@pytest.mark.parametrize("dtype", FLOAT16, ids=str)
def test_the_dense_weight(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = weight_of("tile", shape, dtype)
        assert torch.equal(tile_expand(*packed("tile", weight)[1], shape[1], dtype), weight)


@pytest.mark.parametrize("name", NAMES)
def test_odd_memory_other_streams_and_replayed_graphs(name: str) -> None:
    weight = weight_of(name, (100, 515), torch.bfloat16)
    layout, tensors = packed(name, weight)
    plain = torch.randn(2, 515, device="cuda").bfloat16()
    shifted = torch.empty(1031, device="cuda", dtype=torch.bfloat16)[1:].view(2, 515).copy_(plain)
    strided = torch.empty(515, 2, device="cuda", dtype=torch.bfloat16).T.copy_(plain)
    for x in (plain, shifted, strided, plain[:, None], plain[0]):
        got = layout.linear(x, tensors, None)
        assert_right(got.reshape(-1, 100), x.reshape(-1, 515), weight, None)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layout.linear(plain, tensors, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layout.linear(plain, tensors, None)
    for _ in range(3):
        plain.copy_(torch.randn_like(plain))
        graph.replay()
        assert_right(out, plain, weight, None)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    weight = weight_of(name, (96, 260), torch.bfloat16)
    layout, tensors = packed(name, weight)
    x = torch.randn(3, 260, device="cuda").bfloat16().requires_grad_()
    bias = torch.randn(96, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn(3, 96, device="cuda").bfloat16()
    layout.linear(x, tensors, bias).backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    assert_right(x.grad, grad, weight.T, None)
    torch.testing.assert_close(bias.grad, grad.sum(0))
