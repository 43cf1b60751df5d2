"""ONNX for encoders: float32, with the integers and scales of quantised layers as they are.

Format: https://onnx.ai/onnx/operators. A w8a16 layer is ``DequantizeLinear`` of its int8 weight before a
``MatMul``. A w8a8 layer rounds its input per token as compressed-tensors does, and multiplies by
``MatMulInteger``; onnxruntime's own dynamic quantisation would round each whole tensor instead.

Shapes: O = out_features, I = in_features, B = batch, T = tokens.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresskit.errors import Fault
from compresskit.exports.base import Prospect, layer_faults, package_faults
from compresskit.exports.plain import tensors_of
from compresskit.formats.checkpoint import set_quantization
from compresskit.formats.grid import Grid
from compresskit.modeling import ModelSource, copy_sidecars
from compresskit.modeling.skeleton import model_class
from compresskit.quant.scheme import Scheme

FILE = "model.onnx"
MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet")
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MAX_FILE_BYTES = 1 << 30  # a protobuf holds 2 GiB; beyond this, weights go into a second file
EXAMPLE = (2, 8)
HALF = "Weights are widened from {} to float32, in which onnxruntime computes."


@dataclass(frozen=True, slots=True)
class Onnx:
    """``model.onnx``, any batch and length; configuration and tokenizer beside it."""

    least_bytes: ClassVar[int] = 4
    runtimes: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def faults(self, model: Prospect, where: str) -> list[Fault]:
        """No encoder, an architecture or scheme that is not known here, or a missing package."""
        kind = getattr(model.config, "model_type", "none")
        found = []
        if model.anatomy.is_causal or kind not in MODEL_TYPES:
            cure = "Export to compressed-tensors or dense; for a language model, to gguf."
            got = f"{kind}{' that predicts the next token' if model.anatomy.is_causal else ''}"
            found.append(Fault(where, f"an encoder: {', '.join(MODEL_TYPES)}", got, cure))
        found += package_faults(["onnx", "onnxscript"], "onnx", where)
        return found + layer_faults(model, where, _judge)

    def write(self, model: ModelSource, out: Path) -> tuple[str, ...]:
        """Trace the whole model in memory, encoders being small, and write it."""
        cls: Any = model_class(model.config, model.directory, trust_remote_code=model.trust_remote_code)
        module = cls._from_config(deepcopy(model.config), dtype=torch.float32).train(False)
        state = module.state_dict()
        widened = set()
        with torch.no_grad():
            for name, tensor in tensors_of(model, "reading"):
                state[name].copy_(tensor)
                widened |= {tensor.dtype} - {torch.float32}
        for layer in model.anatomy.linears:
            grid = model.grid(layer)
            if grid is not None:
                linear = module.get_submodule(layer)
                module.set_submodule(layer, _quantised(linear, model.weight_OI(layer), grid))
        _trace(module, out / FILE)
        copy_sidecars(model.directory, out)
        set_quantization(out, None)
        halves = sorted(str(d).removeprefix("torch.") for d in widened if d.is_floating_point)
        return (HALF.format(", ".join(halves)),) if halves else ()


class WeightOnly(nn.Module):
    """A linear layer whose int8 weight is dequantised as it runs.

    The weight stands as (O, I), so that a ``Transpose`` comes before the ``MatMul``: onnxruntime would fuse
    the two without it, and round the layer's inputs to 8 bits of its own accord.
    """

    q_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, q_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("q_OI", q_OI)
        self.register_buffer("scale_O", scale_O.float())
        self.register_buffer("bias_O", bias_O)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The layer's output (B, T, O)."""
        weight_OI = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.q_OI, self.scale_O),
            {"axis": 0},
            dtype=torch.float32,
            shape=self.q_OI.shape,
        )
        return nn.functional.linear(x_BTI, weight_OI, self.bias_O)


class RoundedInputs(nn.Module):
    """A linear layer that multiplies integers: its input's, with one scale per token or a fixed one."""

    q_IO: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, q_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, grid: Grid) -> None:
        super().__init__()
        fixed = grid.activation_scale
        self.limit = 2 ** ((grid.activation_bits or 8) - 1)
        self.register_buffer("q_IO", q_OI.t().contiguous())
        self.register_buffer("scale_O", scale_O.float())
        self.register_buffer("bias_O", bias_O)
        self.register_buffer("fixed", None if fixed is None else fixed.float())

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The layer's output (B, T, O)."""
        scale_BT1: Any = self.fixed
        if scale_BT1 is None:
            scale_BT1 = x_BTI.abs().amax(-1, keepdim=True) / (self.limit - 0.5)
            scale_BT1 = scale_BT1.where(scale_BT1 != 0, torch.finfo(torch.float32).eps)
        q_BTI = (x_BTI / scale_BT1).clamp(-self.limit, self.limit - 1).round().to(torch.int8)
        shape = (*x_BTI.shape[:-1], self.q_IO.shape[1])
        sum_BTO = torch.onnx.ops.symbolic("MatMulInteger", (q_BTI, self.q_IO), dtype=torch.int32, shape=shape)
        y_BTO: Tensor = sum_BTO.float() * scale_BT1 * self.scale_O
        return y_BTO if self.bias_O is None else y_BTO + self.bias_O


class _Plain(nn.Module):
    """The model with its inputs by position and its outputs as a tuple."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs that are tensors."""
        found = self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True)
        return tuple(value for value in found.values() if isinstance(value, Tensor))


def _quantised(linear: nn.Module, weight_OI: Tensor, grid: Grid) -> nn.Module:
    bias = getattr(linear, "bias", None)
    bias_O = None if bias is None else bias.detach().clone()
    q_OI, scale_O = grid.quantize(weight_OI), grid.scale_OG[:, 0]
    if grid.activation_bits is None:
        return WeightOnly(q_OI, scale_O, bias_O)
    return RoundedInputs(q_OI, scale_O, bias_O, grid)


def _trace(module: Any, path: Path) -> None:
    known = inspect.signature(module.forward).parameters
    names = [name for name in INPUTS if name in known]
    example = tuple(torch.ones(EXAMPLE, dtype=torch.long) for _ in names)
    with torch.no_grad():
        outputs = module(**dict(zip(names, example, strict=True)), return_dict=True)
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    axes = {0: "batch", 1: "sequence"}
    with _quiet():
        torch.onnx.export(
            _Plain(module, names),
            example,
            path,
            input_names=names,
            output_names=[name for name, value in outputs.items() if isinstance(value, Tensor)],
            dynamic_shapes=((*(axes for _ in names),),),
            external_data=size > MAX_FILE_BYTES,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own workings, and says so in the log; neither is about the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _judge(scheme: Scheme, in_features: int) -> tuple[str, str] | None:
    """What is written; see ``layer_faults``."""
    if (scheme.number, scheme.weight_bits, scheme.symmetric) == (
        "int",
        8,
        True,
    ) and scheme.group_size is None:
        return None
    held = "symmetric integers of 8 bits, one scale per row"
    return held, "Quantise to w8a8 or w8a16, or write it dense first: --to dense, then --to onnx."
