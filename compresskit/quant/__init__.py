"""Quantisation: which grid weights lie on. One file per method; this table is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.quant.base import Quantizer

QUANTIZERS: Registry[Quantizer] = Registry(
    "quantizer",
    {
        "rtn": "compresskit.quant.rtn:RoundToNearest",
        "gptq": "compresskit.quant.gptq:GPTQ",
        "awq": "compresskit.quant.awq:ActivationAware",
        "smoothquant": "compresskit.quant.smoothquant:SmoothQuant",
        "hqq": "compresskit.quant.hqq:HalfQuadratic",
    },
)
