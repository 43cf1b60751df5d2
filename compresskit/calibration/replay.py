"""What of a block need not run again: modules whose results the kept input of a layer makes anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compresskit.calibration.activations import Activations
from compresskit.errors import Fault, StatisticError
from compresskit.modeling.forwards import computing


@dataclass(frozen=True, slots=True)
class Replay:
    """How a module's result is made again from the kept input of a layer.

    Attributes:
        module: qualified name of the module that need not run.
        layer: the layer whose input is kept.
        applies_layer: the result is what ``layer``, the last of ``module``, makes of that input; else it is
            that input itself, which ``module`` makes and ``layer`` behind it reads.
        extras: None where the module returns a tensor, else so many None behind the tensor in a tuple.
    """

    module: str
    layer: str
    applies_layer: bool
    extras: int | None

    def replaces(self, other: Replay) -> bool:
        """Whether ``other`` is not asked for once this one is."""
        return f"{other.module}.".startswith(f"{self.module}.")


class Replays:
    """What is kept of one block, and its use.

    Args:
        root: the model.
        spill: where to keep inputs in files instead of memory: names begin with it.
        device: to compute on.
    """

    def __init__(self, root: nn.Module, spill: Path | None, device: torch.device) -> None:
        self._root, self._spill, self._device = root, spill, device
        self._pool: list[Activations] = []
        self._kept: dict[Replay, Activations] = {}
        self._made: dict[Replay, set[int]] = {}

    @contextmanager
    def during(
        self, batch: int, tokens: int, keeps: Sequence[Replay] = (), *, is_last: bool = False
    ) -> Iterator[None]:
        """Within, replays are used for ``batch``, and the inputs of the layers of ``keeps`` are kept.

        Args:
            batch: its number.
            tokens: so many it has.
            keeps: not used before the next pass.
            is_last: no pass follows in which a replay is used.

        Raises:
            StatisticError: a layer of ``keeps`` runs other than once with every token.
        """
        self._forget_replaced(keeps)
        used = [replay for replay in self._kept if replay not in keeps]
        stand_ins = [(self._module(r.module), self._forward(r, batch, is_last)) for r in used]
        with ExitStack() as stack:
            stack.enter_context(computing(stand_ins))
            seen: list[str] = []
            for replay in keeps:
                if replay not in self._kept:
                    self._kept[replay], self._made[replay] = self._free_place(), set()
                hook = self._keeper(replay, batch, tokens, seen)
                # Before any other hook: one that measures the layer may leave the batch.
                handle = self._module(replay.layer).register_forward_pre_hook(
                    hook, prepend=True, with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

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

    def _module(self, name: str) -> nn.Module:
        return self._root.get_submodule(name)

    def _forget_replaced(self, keeps: Sequence[Replay]) -> None:
        """Free what is no longer asked for: a later replay, complete by now, replaces it."""
        done = [replay for replay in self._kept if replay not in keeps]
        for index, old in enumerate(done):
            if any(new.replaces(old) for new in done[index + 1 :]):
                self._kept.pop(old).clear()

    def _free_place(self) -> Activations:
        """A place that nothing is kept in; its file, if it has one, is written over."""
        for place in self._pool:
            if not any(place is taken for taken in self._kept.values()):
                return place
        name = None if self._spill is None else f"{self._spill.name}-{len(self._pool)}"
        self._pool.append(
            Activations(None if name is None or self._spill is None else self._spill.with_name(name))
        )
        return self._pool[-1]

    def _keeper(self, replay: Replay, batch: int, tokens: int, seen: list[str]) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            if value[..., 0].numel() != tokens or replay.layer in seen:
                raise StatisticError(not_once(replay.layer))
            seen.append(replay.layer)
            self._kept[replay][batch] = value

        return keep

    def _forward(self, replay: Replay, batch: int, is_last: bool) -> Callable[..., Any]:
        kept, made = self._kept[replay], self._made[replay]

        def forward(*args: Any, **kwargs: Any) -> Any:
            value = kept[batch].to(self._device)
            if replay.applies_layer and batch not in made:
                value = self._module(replay.layer)(value)
                if not is_last:
                    kept[batch] = value
                    made.add(batch)
            return value if replay.extras is None else (value, *[None] * replay.extras)

        return forward


def not_once(layer: str) -> Fault:
    """The fault of a layer that ran once with every token of the first document, and now does not."""
    got = "another number of tokens, or runs, than in the first document"
    return Fault(
        layer, "one run with every token", got, "Calibrate on rows of one length, or add it to ignore."
    )
