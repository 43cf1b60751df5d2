"""What a model keeps of its forward pass for its backward pass: all, the input of blocks, or what is dear.

Blocks are recomputed in the backward pass: each, every n-th, or but for the outputs of matrix products and
attention, which are kept because they are what takes long. What is kept may wait in the memory of the host.

Papers: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174;
by operator: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
https://arxiv.org/abs/2205.05198; on the host: Rhu et al., "vDNN", 2016, https://arxiv.org/abs/1602.08124.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from compresskit.errors import EngineError, Fault
from compresskit.modeling.anatomy import anatomy_of
from compresskit.training.fields import TrainingFields

DEAR = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_int_mm",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
"""ATen operators whose outputs are kept where blocks are recomputed by operator."""
SMALL = 1024
"""Numbers of a tensor that is not worth a copy to the host."""


@contextmanager
def saving_activations(model: nn.Module, fields: TrainingFields) -> Iterator[None]:
    """While this lasts, the blocks of ``model`` keep in training what ``fields`` say.

    Args:
        model: a language model of transformers, not wrapped yet.
        fields: of the stage.

    Raises:
        EngineError: they are of a kind that transformers cannot recompute.
    """
    if not (fields.activation_checkpointing or fields.offload_activations):
        yield
        return
    blocks = _set(model, fields)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("_gradient_checkpointing_func", None)
        name = "activation_checkpointing_disable"
        disable: Any = getattr(model, name, None) or model.gradient_checkpointing_disable
        disable()


def _set(model: nn.Module, fields: TrainingFields) -> WeakSet[nn.Module]:
    """Have blocks keep what ``fields`` say; they are held weakly, since a pipeline lets go of some."""
    _enable(model)
    blocks = [model.get_submodule(name) for name in anatomy_of(model).blocks]
    if not all(hasattr(block, "gradient_checkpointing") for block in blocks):
        cure = "Leave activation_checkpointing and offload_activations out."
        got = type(blocks[0]).__name__
        raise EngineError(Fault("activation_checkpointing", "blocks that can be recomputed", got, cure))
    others: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    for module in others:
        module.gradient_checkpointing = fields.activation_checkpointing
    for index, block in enumerate(blocks):
        again = fields.recomputes(index)
        run = partial(_recomputed, by_operator=fields.checkpoint_operators) if again else _called
        if fields.offload_activations:
            run = partial(_offloaded, run, block)
        block.gradient_checkpointing = again or fields.offload_activations  # type: ignore[assignment]
        block._gradient_checkpointing_func = run  # type: ignore[assignment]
    return WeakSet(blocks)


def _enable(model: nn.Module) -> None:
    """Under either of the names transformers has for it, which refuses models that cannot."""
    kwargs = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]


def _called(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _recomputed(function: Callable[..., Any], *args: Any, by_operator: bool) -> Any:
    if not by_operator:
        return checkpoint(function, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _kept)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _kept(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what :data:`DEAR` names; everything else is cheap."""
    dear = getattr(operator, "_overloadpacket", None) in _dear()
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _dear() -> frozenset[Any]:
    """The operators of :data:`DEAR` that this torch has."""
    return frozenset(getattr(torch.ops.aten, name) for name in DEAR if hasattr(torch.ops.aten, name))


def _offloaded(run: Callable[..., Any], block: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    states = next((a for a in args if isinstance(a, Tensor)), None)
    tokens = 0 if states is None else states.numel() // states.shape[-1]
    with offloading(block, tokens):
        return run(function, *args)


def offloading(block: nn.Module, tokens: int, *, from_cpu: bool = False) -> saved_tensors_hooks:
    """While it lasts, what ``block`` saves for its backward pass waits in pinned memory of the host.

    Its weights stay: an engine knows when to let go of them. So do copies of them in another type, which only
    their shape tells apart from activations; where a side of it is as long as the batch, they are moved too.

    Args:
        block: that computes.
        tokens: in all rows that it is given.
        from_cpu: whether tensors that are in the host's memory already are copied all the same.
    """
    copies: dict[Any, tuple[Any, Any]] = {}
    shapes = {shape for p in block.parameters() if p.dim() == 2 for shape in (p.shape, p.shape[::-1])}

    def is_weight(tensor: Tensor) -> bool:
        if tensor.shape in shapes and tokens not in tensor.shape:
            return True
        own = tensor.untyped_storage()._cdata  # weights as they lie now: engines make them whole for a while
        return any(own == p.untyped_storage()._cdata for p in block.parameters())

    def pack(tensor: Tensor) -> Any:
        stays = tensor.device.type == "cpu" and not from_cpu
        if stays or tensor.numel() < SMALL or is_weight(tensor) or type(tensor) is not Tensor:
            return tensor
        pinned = tensor.device.type == "cuda"
        storage = tensor.untyped_storage()
        layout = () if tensor.is_contiguous() else (tensor.shape, tensor.stride())
        key = (storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version, layout)
        made, there = copies.get(key, (None, None))
        if made is None or made() is not storage:  # several operators may save one tensor
            there = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            there.view(tensor.shape).copy_(tensor, non_blocking=pinned)
            copies[key] = (weakref.ref(storage), there)
        return tensor.device, there, tensor.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, there, shape = packed
        back: Tensor = there.to(device, non_blocking=there.is_pinned()).view(shape)
        return back

    return saved_tensors_hooks(pack, unpack)
