"""Checkpoints to export: dense with grids, as a stage leaves them, and packed, as users get them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.formats import export
from compresskit.formats.checkpoint import write_shards
from compresskit.formats.grid import Grid, write_grids
from compresskit.modeling import ModelSource, copy_sidecars, open_model
from compresskit.quant.affine import grid_for
from compresskit.quant.scheme import parse
from tests.formats.rounding import round_tokens

TOKENS = torch.arange(1, 61).view(2, -1)


def on_grids(source: ModelSource, out: Path, schemes: dict[str, str]) -> ModelSource:
    """``source`` with the layers whose names end as a key of ``schemes`` says rounded to nearest."""
    tensors = {name: source.tensor(name) for name in source.names()}
    grids: dict[str, Grid] = {}
    for layer, linear in source.anatomy.linears.items():
        scheme = next((parse(s) for tail, s in schemes.items() if layer.endswith(tail)), None)
        if scheme is not None and not linear.tied and not scheme.misfit(linear.in_features):
            weight = tensors[f"{layer}.weight"]
            grid = grid_for(weight, scheme)
            grids[layer] = replace(grid, activation_scale=torch.tensor([0.05])) if scheme.static else grid
            tensors[f"{layer}.weight"] = grids[layer].snap(weight)
    out.mkdir(parents=True)
    write_shards(out, tensors.items())
    write_grids(out, grids)
    copy_sidecars(source.directory, out)
    return open_model(out)


def rounding(grid: Grid) -> Callable[..., Any]:
    """A hook that rounds a layer's inputs as ``grid`` says."""
    bits, fixed = grid.activation_bits, grid.activation_scale

    def hook(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        if bits is None:
            return args
        if fixed is None:
            return (round_tokens(args[0], bits),)
        half = 2 ** (bits - 1)
        return ((args[0] / fixed).clamp(-half, half - 1).round() * fixed,)

    return hook


def packed(model: ModelSource, out: Path, scheme: str) -> ModelSource:
    """``model`` packed into ``out``, with as much of a manifest as says which stage quantised it."""
    out.mkdir()
    export(model, out)
    promise = {"kind": "grid", "layer": "any", "scheme": scheme}
    stage = {"name": "2-quantize", "result": {"promises": [promise]}}
    manifest = {"recipe": {"model": str(model.directory)}, "stages": [stage]}
    (out / "compresskit.json").write_text(json.dumps(manifest))
    return open_model(out)


READER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
weights = {}
for name, module in model.named_modules():
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Linear):
        if getattr(module, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit
            weight = dequantize_4bit(weight.data, module.quant_state)
        elif type(weight.data) is not torch.Tensor:
            weight = weight.dequantize()
        weights[name] = weight.detach().clone()
with torch.no_grad():
    logits = model(torch.arange(1, 61).view(2, -1)).logits
torch.save((weights, logits), sys.argv[1] + ".pt")
"""


def as_users_see_it(directory: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and logits of plain ``from_pretrained``, in a process that never heard of compresskit."""
    done = subprocess.run([sys.executable, "-c", READER, str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: tuple[dict[str, Tensor], Tensor] = torch.load(f"{directory}.pt")
    return found
