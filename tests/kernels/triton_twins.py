"""Run by test_triton.py: ``interpret`` compares twins with the exact product, ``compile`` compiles them."""

from __future__ import annotations

import sys
from itertools import islice

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compresskit.kernels.bitmap import Bitmap, pack, unpack
from compresskit.kernels.packed.bitmap import BitmapRows
from compresskit.kernels.packed.block import Block
from compresskit.kernels.packed.two_four import TwoFour
from compresskit.kernels.triton import refusal
from compresskit.kernels.triton.bitmap_linear import bitmap_kernel, bitmap_linear
from compresskit.kernels.triton.block_linear import block_kernel, block_linear
from compresskit.kernels.triton.two_four_linear import two_four_kernel, two_four_linear
from tests.kernels.packed_cases import draw, exact, inputs_of, tolerance, weight

TWINS = (
    (BitmapRows(), bitmap_linear, "half"),
    (TwoFour(), two_four_linear, "2:4"),
    (Block(), block_linear, "few"),
)
TYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.int8, torch.bfloat16),
    (torch.int8, torch.float32),
)
CODES = {"cubin": GPUTarget("cuda", 90, 32), "hsaco": GPUTarget("hip", "gfx942", 64)}
SHAPES = ((1, 1), (5, 13), (16, 64), (33, 200))


def weight_of(shape: tuple[int, int], values: torch.dtype, zeros: str) -> Bitmap:
    """``few``: kept weights lie in the first and the fourth of every four columns of blocks."""
    if zeros != "few":
        return weight(shape, values, zeros, groups=2 if shape[1] % 2 == 0 else 1)
    dense = unpack(weight(shape, values, "half"))
    return pack(dense * (torch.arange(shape[1]) // 16 % 3 == 0))


def interpret() -> None:
    assert not refusal("bitmap_linear")
    for layout, run, zeros in TWINS:
        for values, inputs in TYPES:
            if values == torch.int8 and zeros == "few":
                continue  # blocks are floating
            for shape in SHAPES:
                packed = weight_of(shape, values, zeros)
                tensors = layout.pack(packed, torch.device("cpu"))
                bias = draw((shape[0],), 5).to(inputs) if shape[0] % 2 else None
                for tokens in (0, 1, 17):
                    some = 4 if shape == (5, 13) else 1
                    for x in islice(inputs_of(tokens, shape[1], inputs), some):
                        got = run(x, *tensors, bias)
                        assert got.dtype == inputs
                        assert got.shape == (*x.shape[:-1], shape[0]), (layout, shape, x.shape)
                        error = (got.double() - exact(x, packed, bias)).abs()
                        assert bool((error <= tolerance(x, packed, bias)).all()), (layout, shape, tokens)


def compile_all() -> None:
    """For a GPU of compute capability 9.0, and AMD's gfx942 where this triton knows it."""
    sizes = {
        "tokens": "i32",
        "rows": "i32",
        "width": "i32",
        "row_words": "i32",
        "groups": "i32",
        "group_width": "i32",
    }
    parts = {
        bitmap_kernel: {"words": "*i64", "values": "*bf16", "starts": "*i64"},
        two_four_kernel: {"values": "*bf16", "places": "*i64"},
        block_kernel: {"values": "*bf16", "columns": "*i32", "starts": "*i32"},
    }
    for kernel, packed in parts.items():
        for tokens in (1, 16):
            types = {"inputs": "*bf16", **packed, "scales": "*fp32", "bias": "*bf16", "out": "*bf16", **sizes}
            flags = {"ROWS": 16, "TOKENS": tokens, "HAS_SCALES": False, "HAS_BIAS": True, "NARROW": True}
            flags = {name: value for name, value in flags.items() if name in kernel.arg_names}
            known = {**types, **dict.fromkeys(flags, "constexpr")}
            signature = {name: known[name] for name in kernel.arg_names}
            constants = {(list(signature).index(name),): value for name, value in flags.items()}
            source = ASTSource(kernel, signature, constants)
            for code, target in CODES.items():
                assert triton.compile(source, target=target).asm[code][:4] == b"\x7fELF"


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
