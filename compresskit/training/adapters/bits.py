"""Weights that no longer move, kept in few bits: under adapters in training, and of a teacher.

NF4 with double quantisation and int8 are bitsandbytes' own, so that a model which its user loads in 4 or 8
bits is the one the adapter was trained on.

Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, https://arxiv.org/abs/2305.14314.
Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresskit.errors import EngineError, Fault
from compresskit.training.adapters.frozen import frozen_linear

INT8_STEPS = 127.0


def bitsandbytes() -> Any:
    """The package; without its advice to fetch kernels, which training does not use, and without a line for
    each int8 product that its inputs pass through float16."""
    for talkative in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    import bitsandbytes as package

    return package


def freeze(
    weight_OI: Tensor, bias_O: Tensor | None, base: str, *, dtype: torch.dtype, sharded: bool = False
) -> nn.Linear:
    """A linear layer whose weight takes no gradient.

    Args:
        weight_OI: (O, I), any float dtype; not modified.
        bias_O: or None.
        base: ``nf4`` (blocks of 64, their scales in 8 bit), ``int8`` (one scale per row) or ``none``.
        dtype: that an NF4 layer multiplies in.
        sharded: an NF4 weight's bytes pass for float32, the type that all weights in training have, so that
            an engine which splits such among ranks splits these too.

    Returns:
        The layer on the CPU, to be called like ``torch.nn.Linear``.
    """
    if base == "none":
        return frozen_linear(weight_OI, bias_O)
    rows, inputs = weight_OI.shape
    has_bias = bias_O is not None
    layer: Any
    if base == "nf4":
        nn4 = bitsandbytes().nn
        layer = nn4.Linear4bit(
            inputs,
            rows,
            has_bias,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=torch.float32 if sharded else torch.uint8,
            device="meta",
        )
        layer.weight = nn4.Params4bit(
            weight_OI.float(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            quant_storage=layer.quant_storage,
            module=layer,
        ).to("cpu")
        # Else an evaluation on such a CPU would repack the weight for good, its scales rounded to bfloat16.
        layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_without_scales)
        if sharded:
            layer.register_forward_pre_hook(_follow)
    else:
        nn8 = bitsandbytes().nn
        layer = nn8.Linear8bitLt(inputs, rows, has_bias, has_fp16_weights=False, device="meta")
        layer.weight = nn8.Int8Params(weight_OI.float(), requires_grad=False, has_fp16_weights=False).to(
            "cpu"
        )
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O.detach().clone(), requires_grad=False)
    return cast(nn.Linear, layer)


def rounded(weight_OI: Tensor, base: str) -> Tensor:
    """``weight_OI`` as a layer from :func:`freeze` has it, (O, I) in float32; zeros stay exactly zero."""
    return frozen_weight(freeze(weight_OI, None, base, dtype=torch.float32))


def frozen_weight(layer: nn.Module) -> Tensor:
    """The weight (O, I) that a layer from :func:`freeze` multiplies with, in float32, on its device."""
    weight: Any = layer.weight
    scales: Any = getattr(layer, "quant_state", None)  # an engine may have made the weight a plain parameter
    if scales is not None:
        scales.to(weight.device)
        found: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, scales)
        return found.float()
    if type(weight).__name__ == "Int8Params":
        state: Any = layer.state
        scale_O: Tensor = state.SCB if weight.SCB is None else weight.SCB
        whole_OI: Tensor = weight.data.float() * (scale_O.to(weight.device) / INT8_STEPS)[:, None]
        return whole_OI
    return cast(Tensor, weight).detach().float()


def _follow(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """The scales of NF4 are neither parameters nor buffers: no engine moves them."""
    weight: Any = layer.weight
    if weight.dtype != torch.float32:
        cure = "Use strategy ddp, or base none."
        raise EngineError(
            Fault("4-bit weights", "bytes that the engine leaves alone", str(weight.dtype), cure)
        )
    scales: Any = layer.quant_state
    scales.to(inputs[0].device)


def _without_scales(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Scales are made anew at every start, and DeepSpeed refuses a checkpoint with names of no parameter."""
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]
