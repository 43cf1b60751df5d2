"""The most bytes of tensors that this process holds while it trains, as the allocators themselves count them.

On a GPU torch keeps count. On a CPU it does not: there every allocation is recorded by torch's profiler,
which sees what engines allocate in C++ too, and what was mapped from files is found among the live tensors.
Counting begins when the first optimiser step is done, so that the optimiser's states are there, and ends with
the last.
"""

from __future__ import annotations

import gc
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(slots=True)
class Counted:
    """What was counted.

    Attributes:
        step_ends: nanoseconds since the epoch at which optimiser steps were done.
        peak_bytes: of tensors, from the end of the first step to that of the last; 0 where there were fewer.
        mapped_bytes: of these the tensors whose memory no allocator gave.
        held_bytes: of parameters, when the optimiser has stepped once: ``weights`` of modules that train,
            ``masters`` that are stepped in their place, ``gradients``, and ``optimiser`` states.
    """

    step_ends: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    mapped_bytes: int = 0
    held_bytes: Mapping[str, int] = field(default_factory=dict)
    storages: Mapping[int, int] = field(default_factory=dict)


@contextmanager
def counting(device: str) -> Iterator[Counted]:
    """While this lasts a training run is watched; what it came to is known at the end.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    counted = Counted()
    before = _storages() if device == "cpu" else {}  # what was there already is no part of it
    with _watched(counted, device), _recorded(device) as allocations:
        yield counted
    if device == "cpu" and len(counted.step_ends) > 1:
        live, peak = _live_and_peak(allocations(), counted.step_ends)
        made = {place: count for place, count in counted.storages.items() if place not in before}
        mapped = sum(count for place, count in made.items() if not _lies_in(live, place))
        counted.mapped_bytes, counted.peak_bytes = mapped, peak + mapped


@contextmanager
def _watched(counted: Counted, device: str) -> Iterator[None]:
    def ended(optimizer: Any, *_: Any) -> None:
        if not counted.step_ends:
            counted.held_bytes = _held(optimizer)
        if device == "cuda":
            if counted.step_ends:
                counted.peak_bytes = torch.cuda.max_memory_allocated()
            else:
                torch.cuda.reset_peak_memory_stats()
        elif not counted.step_ends:
            counted.storages = _storages()
        counted.step_ends.append(time.time_ns())

    handle = register_optimizer_step_post_hook(ended)
    try:
        yield
    finally:
        handle.remove()


def _held(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """See :attr:`Counted.held_bytes`."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and m.training]
    weights = [p for m in modules for p in m._parameters.values() if p is not None]
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    # Under ZeRO-3 a weight is empty, and this rank's part of it lies beside.
    kept = [getattr(p, "ds_tensor", p) for p in weights]
    found = {"weights": _bytes(kept)}
    found["masters"] = _bytes([*kept, *stepped]) - found["weights"]
    found["gradients"] = _bytes([p.grad for p in (*weights, *stepped) if p.grad is not None])
    states = [value for state in optimizer.state.values() for value in state.values()]
    found["optimiser"] = _bytes([t for t in states if isinstance(t, Tensor) and t.dim()])
    return found


def _bytes(tensors: list[Any]) -> int:
    """Of these on this rank, each once."""
    parts = [part for tensor in tensors for part in _parts(tensor)]
    return sum({(part.data_ptr(), part.nbytes): part.nbytes for part in parts}.values())


def _storages() -> dict[int, int]:
    """Address -> bytes of the memory behind every live tensor."""
    found = {}
    gc.collect()  # what nobody can reach any more is no part of it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
                for part in _parts(thing):
                    storage = part.untyped_storage()
                    if storage.device.type != "cpu":  # a fake tensor says that it is on a CPU
                        continue
                    found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def _parts(tensor: Any) -> list[Tensor]:
    """``tensor``, or this rank's part of one that is sharded."""
    if hasattr(tensor, "_local_tensor"):
        return [tensor._local_tensor]
    names = getattr(type(tensor), "__tensor_flatten__", None)
    if names is None:
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


@contextmanager
def _recorded(device: str) -> Iterator[Callable[[], list[Any]]]:
    """Every allocation on the CPU in order, to be asked for at the end."""
    if device != "cpu":
        yield list
        return
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:

        def allocations() -> list[Any]:
            found, left = [], made.profiler.kineto_results.experimental_event_tree()[::-1]
            while left:
                event = left.pop()
                left += event.children[::-1]
                if event.tag == _EventType.Allocation:
                    found.append(event)
            return sorted(found, key=lambda event: event.start_time_ns)

        yield allocations


def _lies_in(live: Mapping[int, int], place: int) -> bool:
    """Whether an address is of memory that was recorded; of a file it may be that of a tensor inside."""
    return place in live or any(start <= place < start + count for start, count in live.items())


def _live_and_peak(allocations: list[Any], step_ends: list[int]) -> tuple[Mapping[int, int], int]:
    """Address -> bytes in use at the first end of a step, and the most bytes in use until the last one.

    The allocator's own total would have in it what was given back while nobody recorded.
    """
    unseen = _given_back_unseen(allocations)
    live: dict[int, int] = {}
    first: dict[int, int] | None = None
    total = peak = 0
    for number, event in enumerate(allocations):
        place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if event.start_time_ns > step_ends[-1]:
            break
        if first is None and event.start_time_ns > step_ends[0]:
            first, peak = dict(live), total
        if size > 0 and number not in unseen:
            total += size
            live[place] = size
        elif live.get(place) == -size:  # of another size: threads' events of one moment, in the wrong order
            total -= live.pop(place)
        peak = max(peak, total)
    return live if first is None else first, peak


def _given_back_unseen(allocations: list[Any]) -> set[int]:
    """Which allocations were given back although no event says so: their memory was given out again.

    A collective's thread, which nobody records, now and then is the last to let go of a tensor. When it did
    so cannot be known. Such allocations are few, other steps have the same ones: they are left out.
    """
    places: list[int] = []  # of memory in use, rising
    used: dict[int, tuple[int, int]] = {}  # place -> number of the allocation, where it ends
    unseen = set()
    for number, event in enumerate(allocations):
        place, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        at = bisect_left(places, place)
        if size > 0:
            if at and used[places[at - 1]][1] > place:
                at -= 1
            while at < len(places) and places[at] < place + size:
                unseen.add(used.pop(places.pop(at))[0])
            places.insert(at, place)
            used[place] = number, place + size
        elif place in used and used[place][1] == place - size:
            used.pop(places.pop(at))
    return unseen
