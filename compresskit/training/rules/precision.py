"""What does not combine: types of numbers, and what multiplies in int8. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from compresskit.training.fp8 import multiplies_fp8
from compresskit.training.int8 import multiplies_int8
from compresskit.training.rules.base import Rule, swaps_layers
from compresskit.training.setting import Setting

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
MATMULS = ("float", "int8")


def _int8(s: Setting) -> bool:
    return s.fields.matmul == "int8"


def _fp8(s: Setting) -> bool:
    return s.fields.precision == "fp8"


RULES: tuple[Rule, ...] = (
    Rule(
        "precision-name",
        "precision",
        lambda s: s.fields.precision not in PRECISIONS,
        "fp32, bf16, fp16 or fp8",
        "{precision!r}",
        "Choose one of these.",
    ),
    Rule(
        "fp8-missing",
        "precision",
        lambda s: _fp8(s) and find_spec("torchao") is None,
        "the package torchao",
        "an environment without it",
        "Install it with `pip install 'compresskit[qat]'`, or use precision bf16.",
    ),
    Rule(
        "fp8-device",
        "precision",
        lambda s: _fp8(s) and not multiplies_fp8(s.device),
        "a GPU of compute capability 8.9 or higher",
        "a {device} without products in fp8",
        "Use precision bf16.",
    ),
    Rule(
        "fp8-stage",
        "precision",
        lambda s: _fp8(s) and (swaps_layers(s) or _int8(s)),
        "bf16 where layers compute with rounded, frozen or masked weights, or in int8",
        "{precision}",
        "Use precision bf16; fp8 is for finetune and distill without adapters, with matmul float.",
    ),
    Rule(
        "fp8-deepspeed",
        "precision",
        lambda s: _fp8(s) and s.strategy == "deepspeed",
        "bf16 with strategy deepspeed",
        "{precision}",
        "Use strategy ddp or fsdp, or precision bf16.",
    ),
    Rule(
        "fp16-sharded",
        "precision",
        lambda s: s.fields.precision == "fp16" and s.strategy in ("fsdp", "tp", "deepspeed"),
        "fp32 or bf16 with strategy {strategy}",
        "fp16, whose loss scale must see the gradients of all ranks at once",
        "Use precision bf16, or strategy ddp.",
    ),
    Rule(
        "matmul-name",
        "matmul",
        lambda s: s.fields.matmul not in MATMULS,
        "float or int8",
        "{matmul!r}",
        "Choose one of these.",
    ),
    Rule(
        "matmul-int8-missing",
        "matmul",
        lambda s: _int8(s) and find_spec("torchao") is None,
        "the package torchao",
        "an environment without it",
        "Install it with `pip install 'compresskit[qat]'`, or use matmul float.",
    ),
    Rule(
        "matmul-int8-device",
        "matmul",
        lambda s: _int8(s) and find_spec("torchao") is not None and not multiplies_int8(s.device),
        "a GPU of compute capability 8.0 or higher with Triton, or a CPU where Triton finds no GPU",
        "a {device} for which torchao has no int8 product",
        "Use matmul float; for a CPU beside a GPU, hide the GPU: CUDA_VISIBLE_DEVICES= in the environment.",
    ),
    Rule(
        "matmul-int8-stage",
        "matmul",
        lambda s: _int8(s) and swaps_layers(s),
        "float in a stage whose layers compute with rounded, frozen or masked weights",
        "{matmul}",
        "Use matmul float; int8 is for finetune and distill without adapters.",
    ),
    Rule(
        "matmul-int8-deepspeed",
        "matmul",
        lambda s: _int8(s) and s.strategy == "deepspeed",
        "float with strategy deepspeed",
        "{matmul}",
        "Use strategy ddp or fsdp, or matmul float.",
    ),
    Rule(
        "matmul-int8-fp16",
        "precision",
        lambda s: _int8(s) and s.fields.precision == "fp16",
        "fp32 or bf16 beside matmul int8, whose sums of integers overflow fp16",
        "{precision}",
        "Use precision bf16, or matmul float.",
    ),
)
