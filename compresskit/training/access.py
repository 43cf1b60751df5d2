"""The only code that knows how an engine keeps parameters: whole, as DTensor shards or as ZeRO partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from compresskit.errors import EngineError, Fault

New = Callable[[Tensor, Tensor | None], Tensor]
"""From the whole weight, and its gradient where that was collected, to another weight of its shape."""


class ParamAccess(Protocol):
    """Reaches the parameters of a bare model that an engine has prepared.

    Every method is a collective: all ranks call it, in the same order.

    Attributes:
        collecting: while set, the gradients of masked parameters are summed up, as they are before the mask,
            for the next :meth:`change`, which has to come while it is set still; a parameter that took no
            part in the loss has zeros. Each rank keeps as much of a sum as it keeps of the parameter.
    """

    collecting: bool

    def drop(self) -> None:
        """Forget what was collected, and collect no more; no collective."""
        ...

    def local(self, parameter: nn.Parameter) -> Tensor:
        """This rank's own part of ``parameter``; all of it where nothing is sharded."""
        ...

    def settle(self, model: nn.Module) -> None:
        """After a forward pass that no backward pass follows: give up what was gathered for it."""
        ...

    def gather(self, model: nn.Module, *, keep: bool, frozen: bool = True) -> dict[str, Tensor]:
        """The whole state dict on the CPU, one tensor after another; empty where ``keep`` is False.

        Without ``frozen`` it lacks the parameters that take no gradient.
        """
        ...

    def mask_gradient(self, parameter: nn.Parameter) -> Callable[[], None]:
        """From now on zero the gradient of ``parameter`` wherever it is itself zero; returns the undoing."""
        ...

    def change(self, parameter: nn.Parameter, optimizer: Any, new: New) -> None:
        """Make ``parameter`` what ``new`` returns, in every copy of it that the engine keeps.

        Where a weight becomes zero or ceases to be, the optimiser forgets it: else its momentum would move a
        pruned weight once more. Call between steps; no more than one whole weight is alive at a time.

        Args:
            parameter: a weight in training.
            optimizer: of torch, inside whatever the engine wraps it in.
            new: every rank calls it with the same weight and the same gradient, so that all ranks agree on
                what it finds; it changes nothing in place. The gradient is true up to a factor.
        """
        ...


class Whole:
    """Every rank holds every parameter, and no other copy of it: one process and DDP."""

    def __init__(self) -> None:
        self.collecting = False
        self._sums: dict[nn.Parameter, Tensor] = {}

    def drop(self) -> None:
        """See :meth:`ParamAccess.drop`."""
        self.collecting = False
        self._sums.clear()

    def settle(self, model: nn.Module) -> None:
        """See :meth:`ParamAccess.settle`; nothing is ever gathered."""

    def local(self, parameter: nn.Parameter) -> Tensor:
        """The parameter."""
        return parameter.detach()

    def gather(self, model: nn.Module, *, keep: bool, frozen: bool = True) -> dict[str, Tensor]:
        """See :meth:`ParamAccess.gather`."""
        return {name: copied(t) for name, t in wanted(model, frozen=frozen).items()} if keep else {}

    def mask_gradient(self, parameter: nn.Parameter) -> Callable[[], None]:
        """See :meth:`ParamAccess.mask_gradient`; runs before any engine reduces the gradient."""

        def mask(gradient: Tensor) -> Tensor:
            _require_whole(parameter, gradient)
            if self.collecting:
                self._collect(parameter, gradient.detach())
            return gradient.masked_fill(parameter.detach() == 0, 0)

        handle: Any = parameter.register_hook(mask)  # type: ignore[no-untyped-call]
        remove: Callable[[], None] = handle.remove
        return remove

    def _collect(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add what this rank has of a gradient."""
        mine = self._sums.setdefault(parameter, torch.zeros_like(gradient))
        mine += gradient

    def _own(self, parameter: nn.Parameter) -> Tensor | None:
        """What this rank collected, of which nothing stays; zeros if its loss did without ``parameter``."""
        if not self.collecting:
            return None
        found = self._sums.pop(parameter, None)
        return torch.zeros_like(self.local(parameter)) if found is None else found

    def _collected(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole of what was collected, over all ranks."""
        total = self._own(parameter)
        if total is not None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return total

    def change(self, parameter: nn.Parameter, optimizer: Any, new: New) -> None:
        """See :meth:`ParamAccess.change`."""
        whole = parameter.detach()
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(whole, 0)
        made = new(whole, self._collected(parameter))
        _forget(optimizer.state.get(parameter, {}), _turned(whole, made))
        whole.copy_(made)


class Mirrored(Whole):
    """ZeRO-1 and ZeRO-2: parameters are whole, and each rank keeps the copy that is stepped of its share.

    What is written to the parameter alone is overwritten by that copy after the next step.
    """

    def change(self, parameter: nn.Parameter, optimizer: Any, new: New) -> None:
        """See :meth:`ParamAccess.change`."""
        whole = parameter.detach()
        made = new(whole, self._collected(parameter))
        turned = _turned(whole, made)
        whole.copy_(made)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # another rank steps all of it
            return
        mine, place = mapping.lp_fragment_address, mapping.hp_fragment_address
        mapping.hp_fragment.detach().copy_(made.flatten().narrow(0, mine.start, mine.numel))
        flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
        state = {
            name: t.narrow(0, place.start, place.numel)
            for name, t in optimizer.state.get(flat, {}).items()
            if isinstance(t, Tensor) and t.shape == flat.shape
        }
        _forget(state, turned.flatten().narrow(0, mine.start, mine.numel))


class Partitioned(Whole):
    """ZeRO-3: a parameter is whole only while its layer computes, and its shard is ``ds_tensor``."""

    def local(self, parameter: nn.Parameter) -> Tensor:
        """The flat partition."""
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return part.detach()

    def settle(self, model: nn.Module) -> None:
        """See :meth:`ParamAccess.settle`: what was asked for ahead may be under way after the last pass."""
        ahead: Any = getattr(model, "ds_inflight_param_registry", {})
        for parameter in list(ahead):
            ahead.pop(parameter).wait()
            parameter.partition()

    def gather(self, model: nn.Module, *, keep: bool, frozen: bool = True) -> dict[str, Tensor]:
        """See :meth:`ParamAccess.gather`."""
        import deepspeed

        self.settle(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {}
        for name, tensor in wanted(model, frozen=frozen).items():
            parameter = parameters.get(name)
            if parameter is None:
                if keep:
                    tensors[name] = copied(tensor)
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    tensors[name] = copied(parameter.data)
        return tensors

    def part(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """This rank's part of a ``tensor`` shaped as the whole parameter, zeros behind its end."""
        size, rank = self.local(parameter).numel(), dist.get_rank(_group(parameter))
        start = min(rank * size, tensor.numel())
        own = tensor.flatten()[start : start + size]
        return torch.nn.functional.pad(own, (0, size - own.numel()))

    def _collect(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add this rank's part of the gradient of all ranks, so that none keeps a whole one."""
        total = gradient.clone()
        dist.all_reduce(total, group=_group(parameter))
        super()._collect(parameter, self.part(parameter, total))

    def _collected(self, parameter: nn.Parameter) -> Tensor | None:
        """The parts of all ranks together."""
        part = self._own(parameter)
        if part is None:
            return None
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(_group(parameter)))]
        dist.all_gather(parts, part, group=_group(parameter))
        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def change(self, parameter: nn.Parameter, optimizer: Any, new: New) -> None:
        """See :meth:`ParamAccess.change`; the shard and the copy that is stepped are written both."""
        import deepspeed
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().clone()
        made = new(whole, self._collected(parameter))
        self.local(parameter).copy_(self.part(parameter, made))
        safe_set_local_fp32_param(parameter, self.part(parameter, made))
        turned = self.part(parameter, _turned(whole, made))
        for name in sorted({n for s in optimizer.state.values() for n, t in s.items() if _is_flat(t)}):
            state = safe_get_local_optimizer_state(parameter, name)
            safe_set_local_optimizer_state(parameter, state.masked_fill(turned.to(state.device), 0), name)


class Sharded:
    """FSDP2: every parameter is a DTensor, and this rank's shard is its local tensor."""

    def __init__(self) -> None:
        self.collecting = False
        self._sums: dict[nn.Parameter, Any] = {}

    def drop(self) -> None:
        """See :meth:`ParamAccess.drop`."""
        self.collecting = False
        self._sums.clear()

    def settle(self, model: nn.Module) -> None:
        """See :meth:`ParamAccess.settle`: the root keeps its parameters for a backward pass."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local(self, parameter: nn.Parameter) -> Tensor:
        """The shard."""
        shard: Tensor = parameter.to_local()  # type: ignore[attr-defined]
        return shard.detach()

    def gather(self, model: nn.Module, *, keep: bool, frozen: bool = True) -> dict[str, Tensor]:
        """See :meth:`ParamAccess.gather`."""
        tensors = {}
        for name, tensor in wanted(model, frozen=frozen).items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if keep:
                tensors[name] = copied(full)
        return tensors

    def mask_gradient(self, parameter: nn.Parameter) -> Callable[[], None]:
        """See :meth:`ParamAccess.mask_gradient`; runs on the shard, after the gradient was reduced."""

        def mask(parameter: Any) -> None:
            gradient = parameter.grad.to_local()
            if self.collecting:  # once for each step, after all of its passes
                self._sums[parameter] = parameter.grad.detach().clone()
            gradient.masked_fill_(parameter.detach().to_local() == 0, 0)

        handle: Any = parameter.register_post_accumulate_grad_hook(mask)  # type: ignore[no-untyped-call]
        remove: Callable[[], None] = handle.remove
        return remove

    def change(self, parameter: nn.Parameter, optimizer: Any, new: New) -> None:
        """See :meth:`ParamAccess.change`."""
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter.detach()
        whole = sharded.full_tensor()
        gradient = None
        if self.collecting:
            found = self._sums.pop(parameter, None)
            gradient = torch.zeros_like(whole) if found is None else found.full_tensor()
        made = new(whole, gradient)

        def part(tensor: Tensor) -> Tensor:
            mesh, placements = sharded.device_mesh, sharded.placements
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()

        _forget(optimizer.state.get(parameter, {}), part(_turned(whole, made)))
        sharded.to_local().copy_(part(made))


def _group(parameter: nn.Parameter) -> Any:
    """The ranks that ZeRO-3 partitions ``parameter`` among."""
    return parameter.ds_process_group  # type: ignore[attr-defined]


def access_for(engine: str, zero_stage: int) -> ParamAccess:
    """The access to parameters under ``engine``: ``single``, ``ddp``, ``fsdp`` or ``deepspeed``."""
    if engine == "fsdp":
        return Sharded()
    if engine != "deepspeed":
        return Whole()
    return Partitioned() if zero_stage == 3 else Mirrored()


def own_part(tensor: Tensor) -> Tensor:
    """The part of any parameter or gradient that this rank can look at without talking to others."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def local_bytes(access: ParamAccess, model: nn.Module) -> int:
    """Bytes of parameters this rank keeps between steps; shared parameters count once."""
    return sum(part.nbytes for part in _parts(access, model.parameters()))


def _parts(access: ParamAccess, parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        yield access.local(parameter)


def wanted(model: nn.Module, *, frozen: bool) -> dict[str, Tensor]:
    """The state dict, its parameters as such; without ``frozen`` only what training changes."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if frozen:
        return state
    still = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: t for name, t in state.items() if name not in still}


def _turned(before: Tensor, now: Tensor) -> Tensor:
    """Where a weight became zero, or ceased to be."""
    return (before == 0) != (now == 0)


def _forget(state: Mapping[str, Any], turned: Tensor) -> None:
    """Zero an optimiser's state of one weight, or of this rank's part of it, where ``turned``."""
    for value in state.values():
        if isinstance(value, Tensor):
            part = own_part(value)
            if part.shape == turned.shape:
                part.masked_fill_(turned.to(part.device), 0)


def _is_flat(state: Any) -> bool:
    """Whether ``state`` holds a number for each weight; a count of steps does not."""
    return isinstance(state, Tensor) and state.dim() == 1


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares nothing with the model."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _require_whole(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.shape != gradient.shape:
        raise EngineError(
            Fault(
                "held zeros",
                f"a whole weight of shape {tuple(gradient.shape)} in the backward pass",
                f"{tuple(parameter.shape)}",
                "Use another strategy: this version of the engine releases weights too early.",
            )
        )


def zero_fraction(tensor: Tensor) -> float:
    """Zeros of ``tensor``, in [0, 1]."""
    return float((tensor == 0).sum()) / max(tensor.numel(), 1)


def cast_like(tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """``tensors`` in the dtypes they had before training; zeros stay zeros in every float dtype."""
    return {name: t.to(dtypes.get(name, t.dtype)) for name, t in tensors.items()}
