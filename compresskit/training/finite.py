"""Stop at the first loss, gradient or weight that is not finite, and name the step and the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compresskit.errors import Fault, NumericError
from compresskit.training.access import own_part

CURE = "Lower learning_rate, lengthen warmup_fraction, or compute in bf16 or fp32."


def on_every_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    raised = torch.tensor([float(flag)], device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def first_named(finding: str | None) -> str | None:
    """The finding of the lowest rank that has one."""
    if not (dist.is_available() and dist.is_initialized()):
        return finding
    findings: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    return next((f for f in findings if f is not None), None)


def culprit(model: nn.Module, wrapped: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """Run ``inputs`` once more and name the first layer whose output is not finite.

    Args:
        model: the bare model, whose layers are named.
        wrapped: what the engine made of it; every rank must call this together.
        inputs: of the batch whose loss was not finite.

    Returns:
        Such as ``model.layers.3.mlp.down_proj, whose weight is not finite``; None if all is finite here.
    """
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if not name or next(module.children(), None) is not None:
            continue

        def look(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
            if not found and not _all_finite(output):
                spoilt = [
                    n
                    for n, p in module.named_parameters(recurse=False)
                    if p.requires_grad and not own_part(p).isfinite().all()
                ]
                tail = f", whose {spoilt[0]} is not finite" if spoilt else ", whose output overflowed"
                found.append(name + tail)

        handles.append(module.register_forward_hook(look))
    try:
        with torch.no_grad():
            wrapped(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _all_finite(output: Any) -> bool:
    values = output.values() if isinstance(output, Mapping) else output
    tensors = [values] if isinstance(values, Tensor) else [v for v in values if isinstance(v, Tensor)]
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def not_finite(what: str, step: int, layer: str | None) -> NumericError:
    """The error for ``what`` (loss, gradient norm) at optimiser step ``step``, counted from 1."""
    place = f"step {step}" + (f", layer {layer}" if layer else "")
    return NumericError(Fault(place, f"a finite {what}", f"a {what} that is NaN or infinite", CURE))


def bad_gradient(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first parameter whose gradient (this rank's part of it) is not finite."""
    for name, parameter in parameters:
        if parameter.grad is not None and not own_part(parameter.grad).isfinite().all():
            return name
    return None


def require_finite_weights(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise NumericError if any weight about to be saved is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise not_finite("weight", step, name)
