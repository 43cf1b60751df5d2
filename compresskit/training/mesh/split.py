"""Split the layers of a live model among ranks that compute together on the same rows.

torch's styles of tensor parallelism do it for linear layers and the embedding, by transformers' own plan for
the model. The output projection is kept in parts, and whole while it is called: whatever a loss computes
with it stays as it is, at the price of the whole weight and its gradient for that long.

Paper: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, https://arxiv.org/abs/1909.08053.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from compresskit.errors import EngineError, Fault
from compresskit.modeling.anatomy import tied_groups
from compresskit.training.mesh.plan import ELSE, INPUTS, OUTPUTS, PARTLY_SEEN, STYLES, styles


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep of each layer of ``model`` this rank's part, in place; a collective.

    Args:
        model: of transformers, whole and the same on all ranks, on the device of ``mesh``.
        mesh: of one dimension: the ranks that see the same rows.

    Raises:
        EngineError: there is no plan, or a layer it names computes otherwise than a linear layer.
    """
    tied = tied_groups(model)
    modules = dict(model.named_modules())
    found = styles(model.config, modules)
    if not found:
        raise _fault("a plan of how layers are split", type(model).__name__)
    for name, style in found.items():
        if style not in STYLES:
            raise _fault(f"{name} split as {', '.join(STYLES)}", style)
        if style == PARTLY_SEEN:
            _exchange(modules[name], _summing(mesh))
            continue
        if type(modules[name]) is not nn.Linear:
            raise _fault(f"{name} a torch.nn.Linear", type(modules[name]).__name__)
        parallelize_module(modules[name], mesh, _style(style))
    _split_ends(model, mesh)
    for first, *others in tied:
        parameter = model.get_parameter(first)
        for name in others:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_parameter(leaf, parameter)


def _style(style: str) -> ParallelStyle:
    """torch's, of transformers' name for it."""
    if style in OUTPUTS:
        return ColwiseParallel() if style == OUTPUTS[0] else ColwiseParallel(output_layouts=Replicate())
    return RowwiseParallel() if style == INPUTS[0] else RowwiseParallel(input_layouts=Replicate())


def _split_ends(model: nn.Module, mesh: DeviceMesh) -> None:
    """The embedding and the output projection, each rank some tokens' rows of it."""
    ends: Any = model
    embedding, head = ends.get_input_embeddings(), ends.get_output_embeddings()
    if isinstance(embedding, nn.Embedding):
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
        # A view of what ranks exchanged: a model that adds to it in place would lose FSDP's hooks on it.
        embedding.register_forward_hook(lambda _module, _inputs, output: output.clone())
    if isinstance(head, nn.Linear):
        for name, parameter in list(head.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            head.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        _exchange(head, _gathered)


def _gathered(parameter: Tensor) -> Tensor:
    """All of it; every rank has the same gradient, of which it keeps its part."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _summing(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    """The parameter itself, whose gradient is that of all ranks of ``mesh`` added up."""

    def summed(parameter: Tensor) -> Tensor:
        same = DTensor.from_local(parameter, mesh, [Replicate()], run_check=False)
        return same.to_local(grad_placements=[Partial()])

    return summed


def _exchange(module: nn.Module, made: Callable[[Tensor], Tensor]) -> None:
    """While ``module`` is called its own parameters are what ``made`` makes of them."""
    kept: dict[str, nn.Parameter | None] = {}

    def before(module: nn.Module, _: Any) -> None:
        kept.update({name: p for name, p in module._parameters.items() if p is not None})
        module._parameters.update({name: made(p) for name, p in kept.items()})  # type: ignore[misc,arg-type]

    def after(module: nn.Module, *_: Any) -> None:
        module._parameters.update(kept)
        kept.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _fault(expected: str, got: str) -> EngineError:
    return EngineError(Fault("tensor_parallel", expected, got, ELSE))
