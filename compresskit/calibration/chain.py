"""In what steps the layers of a block can be measured, and what of it need not run again after each.

A layer's inputs are those that the changed layers before it make: its block runs as far as the layer, which
is changed, then as far as the next. So that nothing runs over and over, a layer's input is kept, and where a
whole module's result follows from that alone (attention's from the input of its output projection), the
module is not run again: its stand-in applies the layer to what was kept. Then each layer, and each
attention, runs once for all of a block's steps.

Which modules these are is found by running the block on a few tokens, never from a list of names. Blocks that
do not allow it (experts, layers that feed several others in turn) are measured in one step, as they were
before any of their layers was changed.

Shapes: B = documents of a batch, T = tokens, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.calibration.activations import Activations

RUNS = 2
"""In one step and in going on a layer runs twice; more would make steps the slower way."""


@dataclass(frozen=True, slots=True)
class Replay:
    """How a module's result is made again from the kept input of a layer.

    Attributes:
        module: qualified name of the module that need not run.
        layer: the layer whose input is kept.
        applied: the result is what ``layer``, which is the last of ``module``, makes of that input; else it
            is that input itself, which ``module`` makes and ``layer`` behind it reads.
        extras: None where the module returns a tensor, else so many None behind the tensor in a tuple.
    """

    module: str
    layer: str
    applied: bool
    extras: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """Layers that are measured in one pass of the data.

    Attributes:
        layers: qualified names, in order of execution.
        watched: of these, the ones whose inputs are to be seen: the first of those that read the very same
            tensor, or all where the step is the only one of its block.
        keeps: what later passes make use of, kept in this one.
        once: each of the layers runs once in each batch, with every token.
    """

    layers: tuple[str, ...]
    watched: tuple[str, ...]
    keeps: tuple[Replay, ...] = ()
    once: bool = False


def find_steps(
    root: nn.Module,
    block: str,
    linears: Collection[str],
    chosen: Sequence[str],
    probe: Callable[[], Any],
    tokens: int,
) -> tuple[Step, ...]:
    """The steps in which to visit ``chosen``.

    Args:
        root: the model.
        block: name of a block, which is in memory.
        linears: every linear layer of it.
        chosen: of these, the ones to visit; at least one.
        probe: runs the block on a few tokens.
        tokens: so many.

    Returns:
        One step for each tensor that chosen layers read, in order of execution; or a single step.
    """
    trace = _Trace(root, block, linears)
    trace.run(probe)
    groups = trace.groups()
    once = all(trace.runs.get(name) == 1 for name in linears)
    once = once and all(group.tokens == tokens for group in groups)
    whole = (Step(tuple(chosen), tuple(chosen), once=once),)
    if not once:
        return whole
    replays = [trace.replay(group, groups[: index + 1]) for index, group in enumerate(groups)]
    ends = [index for index, group in enumerate(groups) if not set(chosen).isdisjoint(group.layers)]
    if not _pays(groups, replays, ends):
        return whole
    steps, begin = [], 0
    for end in ends:
        layers = tuple(name for name in groups[end].layers if name in chosen)
        keeps = tuple(replay for replay in replays[begin : end + 1] if replay is not None)
        steps.append(Step(layers, layers[:1], keeps, once=True))
        begin = end + 1
    return tuple(steps)


class Replays:
    """What is kept of one block, and the stand-ins that use it.

    Args:
        root: the model.
        spill: where to keep inputs in files instead of memory: names begin with it.
        device: to compute on.
    """

    def __init__(self, root: nn.Module, spill: Path | None, device: torch.device) -> None:
        self._root, self._spill, self._device = root, spill, device
        self._pool: list[Activations] = []
        self._kept: dict[Replay, Activations] = {}
        self._settled: dict[Replay, set[int]] = {}

    @contextmanager
    def keeping(self, replays: Sequence[Replay], batch: int) -> Iterator[None]:
        """Within, the inputs of the layers of ``replays`` are kept for ``batch``."""
        with ExitStack() as stack:
            for replay in replays:
                if replay not in self._kept:
                    self._kept[replay], self._settled[replay] = self._place(len(self._kept)), set()
                layer = self._root.get_submodule(replay.layer)
                hook = self._keep(self._kept[replay], batch)
                # Before any other: one that measures the layer may leave the batch.
                stack.callback(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True).remove)
            yield

    @contextmanager
    def standing_in(self, batch: int, but: Sequence[Replay] = (), *, last: bool) -> Iterator[None]:
        """Within, modules return for ``batch`` what was kept makes of them, those of ``but`` excepted.

        Args:
            batch: its number.
            but: are being kept.
            last: what a layer makes of its kept input will not be asked for again.
        """
        replaced: list[nn.Module] = []
        try:
            for replay in self._kept.keys() - set(but):
                module = self._root.get_submodule(replay.module)
                module.forward = self._stand_in(replay, batch, last)
                replaced.append(module)
            yield
        finally:
            for module in replaced:
                del module.forward

    def clear(self) -> None:
        """Forget what is kept: another block follows."""
        self._kept.clear()
        for place in self._pool:
            place.clear()

    def close(self) -> None:
        """Forget everything, and remove the files."""
        self.clear()
        for place in self._pool:
            place.close()

    def _place(self, number: int) -> Activations:
        """The place that was number ``number`` in the blocks before, too: its file is used again."""
        if number == len(self._pool):
            file = None if self._spill is None else self._spill.with_name(f"{self._spill.name}-{number}")
            self._pool.append(Activations(file))
        return self._pool[number]

    @staticmethod
    def _keep(kept: Activations, batch: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[batch] = args[0] if args else kwargs["input"]

        return keep

    def _stand_in(self, replay: Replay, batch: int, last: bool) -> Callable[..., Any]:
        kept, settled = self._kept[replay], self._settled[replay]

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = kept[batch].to(self._device)
            if replay.applied and batch not in settled:
                value = self._root.get_submodule(replay.layer)(value)
                if not last:
                    kept[batch] = value
                    settled.add(batch)
            return value if replay.extras is None else (value, *[None] * replay.extras)

        return forward


@dataclass(slots=True)
class _Group:
    """Layers that read one tensor."""

    layers: list[str]
    read: Tensor
    version: int

    @property
    def tokens(self) -> int:
        return self.read[..., 0].numel()


@dataclass(frozen=True, slots=True)
class _Result:
    """What a module returned: its tensor as it then was, and the form around it."""

    tensor: Tensor
    version: int
    extras: int | None


@dataclass(slots=True)
class _Trace:
    """One run of a block: what each layer read and what each module returned."""

    root: nn.Module
    block: str
    linears: Collection[str]
    runs: dict[str, int] = field(default_factory=dict)
    _reads: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    _results: dict[str, _Result] = field(default_factory=dict)

    def run(self, probe: Callable[[], Any]) -> None:
        """Run the block."""
        with ExitStack() as stack:
            for name, module in self.root.get_submodule(self.block).named_modules(prefix=self.block):
                hook = module.register_forward_hook(self._returned(name))
                stack.callback(hook.remove)
                if name in self.linears:
                    hook = module.register_forward_pre_hook(self._read(name), with_kwargs=True)
                    stack.callback(hook.remove)
            probe()

    def groups(self) -> list[_Group]:
        """Layers by the tensor that they read, in order of execution."""
        found: list[_Group] = []
        for name, (tensor, version) in self._reads.items():
            if found and found[-1].read is tensor and found[-1].version == version:
                found[-1].layers.append(name)
            else:
                found.append(_Group([name], tensor, version))
        return found

    def replay(self, group: _Group, done: Sequence[_Group]) -> Replay | None:
        """The module with most layers, all of them in groups ``done``, that ``group``'s input makes anew."""
        ran = {name for one in done for name in one.layers}
        best: tuple[int, Replay] | None = None
        for name, result in self._results.items():
            inside = {layer for layer in self.linears if layer.startswith(f"{name}.")}
            if name == self.block or self.runs[name] != 1 or not inside <= ran:
                continue
            made = self._results[group.layers[0]]
            applied = len(group.layers) == 1 and group.layers[0] in inside and _same(result, made)
            is_read = inside.isdisjoint(group.layers) and result.tensor is group.read
            is_read = is_read and result.version == group.version
            size = len(inside) - applied
            if (applied or is_read) and size and (best is None or size > best[0]):
                best = (size, Replay(name, group.layers[0], applied, result.extras))
        return None if best is None else best[1]

    def _read(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else kwargs["input"]
            self._reads[name] = tensor, tensor._version

        return see

    def _returned(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.runs[name] = self.runs.get(name, 0) + 1
            alone = isinstance(output, Tensor)
            first, *rest = (output,) if alone or not isinstance(output, tuple) else (*output, None)
            if isinstance(first, Tensor) and all(value is None for value in rest):
                self._results[name] = _Result(first, first._version, None if alone else len(rest) - 1)

        return see


def _same(one: _Result, other: _Result) -> bool:
    return one.tensor is other.tensor and one.version == other.version


def _pays(groups: Sequence[_Group], replays: Sequence[Replay | None], ends: Sequence[int]) -> bool:
    """Whether steps that end with the groups ``ends`` run no layer more often than a single one would.

    A layer whose input is kept is not counted: it runs once more for what it was changed to.
    """
    runs = dict.fromkeys(range(len(groups)), 0)
    begin = 0
    for end in (*ends, len(groups)):
        stands = [replay.module for replay in replays[:begin] if replay is not None]
        for index in range(end):
            if replays[index] is None and not any(
                groups[index].layers[0].startswith(f"{module}.") for module in stands
            ):
                runs[index] += 1
        begin = end + 1
    return all(count <= RUNS for count in runs.values())
