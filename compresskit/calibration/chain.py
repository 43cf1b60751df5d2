"""In what steps the layers of a block can be measured, and what of it need not run again after each.

A layer's inputs are those that the changed layers before it make: its block runs as far as the layer, which
is changed, then as far as the next. So that nothing runs over and over, a layer's input is kept, and where a
whole module's result follows from that alone (attention's from the input of its output projection), the
module is not run again: a replay of it applies the layer to what was kept. Then each layer, and each
attention, runs once for all of a block's steps.

Which modules these are is found by running the block on a document, never from a list of names, and tried
out: with replays every layer has to read, bit for bit, what it reads without. Blocks that do not allow it
(experts, layers that feed several others in turn, modules that leave something behind for others) are
measured in one step, as they were before any of their layers was changed.

Shapes: B = documents of a batch, T = tokens, I = in_features.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.calibration.replay import Replay, Replays

MAX_RUNS = 2
"""Of a layer in all passes: as often as with a single step. More would make steps the slower way."""

Probe = Callable[[int], Any]
"""``probe(0)`` runs a block on a document, ``probe(1)`` on other values of the same shape."""


@dataclass(frozen=True, slots=True)
class Step:
    """Layers that are measured in one pass of the data.

    Attributes:
        layers: qualified names, in order of execution; they read the very same tensor, or the step is the
            only one of its block.
        keeps: what later passes make use of, kept in this one.
        once: each of the layers runs once in each batch, with every token.
    """

    layers: tuple[str, ...]
    keeps: tuple[Replay, ...] = ()
    once: bool = False

    def moved(self, block: str, to: str) -> Step:
        """The same step of block ``to``, which is built like ``block``."""

        def move(name: str) -> str:
            return to + name.removeprefix(block)

        keeps = (replace(r, module=move(r.module), layer=move(r.layer)) for r in self.keeps)
        return Step(tuple(map(move, self.layers)), tuple(keeps), self.once)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a block; ``reason`` says why there is but one where more were possible."""

    steps: tuple[Step, ...]
    reason: str = ""


def whole(names: Sequence[str], *, once: bool = False) -> Step:
    """One step for all of ``names``."""
    return Step(tuple(names), once=once)


def find_steps(
    root: nn.Module, block: str, linears: Collection[str], chosen: Sequence[str], probe: Probe, tokens: int
) -> Plan:
    """The steps in which to visit ``chosen``.

    Args:
        root: the model.
        block: name of a block, which is in memory.
        linears: every linear layer of it.
        chosen: of these, the ones to visit; at least one.
        probe: runs the block.
        tokens: of the document that it runs it on.

    Returns:
        A step for each tensor that chosen layers read, in order of execution; or a single step.
    """
    trace = _Trace(root, block, linears)
    trace.run(lambda: probe(0))
    once = all(trace.runs.get(name) == 1 and trace.tokens[name] == tokens for name in linears)
    if not once:
        return Plan((whole(chosen),), "some of its layers do not run once with every token")
    ends = [i for i, group in enumerate(trace.groups) if not set(chosen).isdisjoint(group)]
    alone = whole(chosen, once=True)
    if len(ends) == 1 and len(trace.groups) == 1:
        return Plan((alone,))
    replays = [trace.replay(index) for index in range(len(trace.groups))]
    if max(_runs(trace.groups, replays, ends)) > MAX_RUNS:
        return Plan((alone,), "nothing less than the block would have to run again for each of its layers")
    steps, begin = [], 0
    for end in ends:
        layers = tuple(name for name in trace.groups[end] if name in chosen)
        keeps = tuple(replay for replay in replays[begin : end + 1] if replay is not None)
        steps.append(Step(layers, keeps, once=True))
        begin = end + 1
    if not _holds(root, steps, trace, probe, tokens):
        return Plan((alone,), "its modules hand each other more than what they return")
    return Plan(tuple(steps))


def build_of(block: nn.Module) -> tuple[Any, ...]:
    """What blocks that take the same steps have in common; where in the model they are is not."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if (isinstance(value, (bool, int, float, str)) and key != "layer_idx") or key == "forward"
            ),
            tuple((key, tuple(parameter.shape)) for key, parameter in module.named_parameters(recurse=False)),
        )
        for name, module in block.named_modules()
    )


def _runs(
    groups: Sequence[Sequence[str]], replays: Sequence[Replay | None], ends: Sequence[int]
) -> list[int]:
    """How often each group runs if steps end with those of ``ends``, in all passes.

    A layer whose input is kept is not counted: it runs once more, for what it was changed to.
    """
    runs, begin = [0] * len(groups), 0
    for end in (*ends, len(groups)):
        used = [f"{replay.module}." for replay in replays[:begin] if replay is not None]
        for index in range(end):
            if replays[index] is None and not any(groups[index][0].startswith(module) for module in used):
                runs[index] += 1
        begin = end + 1
    return runs


def _holds(root: nn.Module, steps: Sequence[Step], trace: _Trace, probe: Probe, tokens: int) -> bool:
    """Whether each step's layers, and what follows the block, get with replays what they get without.

    Before each pass the block runs on something else: what modules leave behind must not matter.
    """
    device = next(root.get_submodule(trace.block).parameters()).device
    wanted = [trace.digests[step.layers[0]] for step in steps] + [trace.digests[trace.block]]
    with closing(Replays(root, None, device)) as replays:
        for at, want in enumerate(wanted):
            probe(1)
            again = _Trace(root, trace.block, trace.linears)
            keeps = steps[at].keeps if at < len(steps) else ()
            with replays.during(0, tokens, keeps, is_last=at == len(steps)):
                again.run(lambda: probe(0))
            name = steps[at].layers[0] if at < len(steps) else trace.block
            if again.digests.get(name) != want:
                return False
    return True


@dataclass(slots=True)
class _Trace:
    """One run of a block: what each layer read and what each module returned, of which nothing is held.

    Attributes:
        runs: how often each module ran.
        tokens: of each layer's input.
        digests: of each layer's input, and of the block's result.
        groups: layers by the tensor that they read, in order of execution.
    """

    root: nn.Module
    block: str
    linears: Collection[str]
    runs: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)
    _replays: list[tuple[int, Replay]] = field(default_factory=list)
    _read: tuple[weakref.ref[Tensor], int] | None = None
    _layer_results: dict[str, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)
    _results: dict[str, tuple[weakref.ref[Tensor], int, int | None]] = field(default_factory=dict)

    def run(self, probe: Callable[[], Any]) -> None:
        """Run the block."""
        with ExitStack() as stack:
            for name, module in self.root.get_submodule(self.block).named_modules(prefix=self.block):
                stack.callback(module.register_forward_hook(self._returned(name)).remove)
                if name in self.linears:
                    hook = module.register_forward_pre_hook(self._reads(name), with_kwargs=True)
                    stack.callback(hook.remove)
            probe()

    def replay(self, index: int) -> Replay | None:
        """The module with most layers that what group ``index`` reads makes anew; none that run later."""
        done = {name for group in self.groups[: index + 1] for name in group}
        best: tuple[int, Replay] | None = None
        for at, found in self._replays:
            inside = self._inside(found.module)
            size = len(inside) - found.applies_layer
            if at == index and inside <= done and size > (best[0] if best else 0):
                best = size, found
        return None if best is None else best[1]

    def _inside(self, module: str) -> set[str]:
        return {layer for layer in self.linears if layer.startswith(f"{module}.")}

    def _reads(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            self.tokens[name], self.digests[name] = value[..., 0].numel(), _digest(value)
            if _is(self._read, value):
                self.groups[-1].append(name)
                return
            self.groups.append([name])
            self._read = weakref.ref(value), value._version
            for module_name, (tensor, version, extras) in self._results.items():
                if _is((tensor, version), value) and name not in self._inside(module_name):
                    replay = Replay(module_name, name, applies_layer=False, extras=extras)
                    self._replays.append((len(self.groups) - 1, replay))

        return see

    def _returned(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.runs[name] = self.runs.get(name, 0) + 1
            first, extras = _form(output)
            if name == self.block:
                self.digests[name] = _digest(output if isinstance(output, Tensor) else output[0])
            elif first is None:
                return
            elif name in self.linears:
                self._layer_results[name] = weakref.ref(first), first._version
            else:
                self._results[name] = weakref.ref(first), first._version, extras
                for index, group in enumerate(self.groups):
                    made = self._layer_results.get(group[0])
                    if len(group) == 1 and group[0] in self._inside(name) and _is(made, first):
                        replay = Replay(name, group[0], applies_layer=True, extras=extras)
                        self._replays.append((index, replay))

        return see


def _form(output: Any) -> tuple[Tensor | None, int | None]:
    """The tensor that ``output`` is or begins a tuple with, and how many None follow; None for all else."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (output[0], len(output) - 1) if all(value is None for value in output[1:]) else (None, None)
    return None, None


def _is(one: tuple[weakref.ref[Tensor], int] | None, other: Tensor) -> bool:
    """Whether ``one`` is the very tensor ``other``, unchanged since."""
    return one is not None and one[0]() is other and one[1] == other._version


def _digest(value: Tensor) -> int:
    flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)
