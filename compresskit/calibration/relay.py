"""Run a model around its blocks, and one block with the arguments that the model would give it.

What a block is called with besides its hidden states (masks, rotary embeddings, positions) differs between
families, and between the blocks of a model with sliding windows. It is never stored: the model itself is run
with all blocks replaced by stand-ins that hand their input on, and stopped at the block in question. That
costs a mask, little beside a block, and no memory; it is spared where the last batch was of the same shape
and the tokens themselves make no difference. While the token embedding is not in memory, zeros of the
shape of its results stand for them: masks and positions do not depend on what they hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.calibration.rows import Row
from compresskit.errors import Fault, ModelError
from compresskit.modeling.streaming import StreamedModel

HIDDEN = "hidden_states"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Leaves the model's forward once a block's arguments are known."""

    def __init__(self, call: Call) -> None:
        self.call = call


class Relay:
    """Runs ``streamed`` piece by piece; gradients off.

    Args:
        streamed: the model.

    Raises:
        ModelError: it has no blocks, or is an encoder and a decoder.
    """

    def __init__(self, streamed: StreamedModel) -> None:
        self._streamed = streamed
        self._blocks = [streamed.module.get_submodule(name) for name in streamed.blocks]
        self._embeddings = [
            part
            for name, part in streamed.module.named_modules()
            if isinstance(part, nn.Embedding) and not streamed.source.anatomy.block_of(name)
        ]
        self._accepts = inspect.signature(streamed.module.forward).parameters
        self._num_extras: int | None = None
        self._same_for_any_tokens = False
        self._last: tuple[int, Row, Call] | None = None
        config = streamed.source.config
        if not self._blocks or getattr(config, "is_encoder_decoder", False):
            got = "no repeated blocks" if not self._blocks else "an encoder and a decoder"
            cure = "Choose a method that needs no calibration."
            raise ModelError(Fault(type(streamed.module).__name__, "one stack of blocks", got, cure))

    def embed(self, row: Row) -> Tensor:
        """The hidden states (B, T, D) that enter block 0; the token embedding must be in memory."""
        return _hidden(self._call_of(row, 0))

    def call(self, index: int, row: Row, hidden: Tensor) -> Call:
        """The arguments that the model calls block ``index`` with, with ``hidden`` (B, T, D) among them."""
        rest = {key: value for key, value in row.items() if key != "input_ids"}
        rest["shape"] = torch.tensor(row["input_ids"].shape)
        if self._last is None or self._last[0] != index or not _same(self._last[1], rest):
            self._last = None  # before another is made
            call = _with_hidden(self._call_of(row, index), hidden[:0])
            if not self._same_for_any_tokens:
                return _with_hidden(call, hidden)
            self._last = index, rest, call
        return _with_hidden(self._last[2], hidden)

    @torch.no_grad()
    def through(self, index: int, row: Row, hidden: Tensor) -> Tensor:
        """What block ``index``, which must be in memory, makes of ``hidden`` (B, T, D)."""
        args, kwargs = self.call(index, row, hidden)
        output = self._blocks[index](*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def finish(self, row: Row, hidden: Tensor) -> None:
        """Run what follows the blocks on ``hidden`` (B, T, D), for the hooks to see."""
        last = len(self._blocks) - 1
        with self._stand_ins(lambda index, call: hidden if index == last else _hidden(call)):
            self._run(row)

    def learn(self, row: Row) -> None:
        """Learn from block 0, which must be in memory, what form the blocks' results have.

        Raises:
            ModelError: blocks hand each other more than hidden states, so they cannot run one by one.
        """
        args, kwargs = self._call_of(row, 0)
        with torch.no_grad():
            output = self._blocks[0](*args, **kwargs)
        self._num_extras = None if isinstance(output, Tensor) else len(output) - 1
        others = [{**row, "input_ids": torch.full_like(row["input_ids"], token)} for token in (0, 1)]
        calls = [_without_hidden(self._call_of(other, 0)) for other in others]
        self._same_for_any_tokens = all(_same(_without_hidden((args, kwargs)), call) for call in calls)
        if len(self._blocks) == 1:
            return
        alone = self._call_of(row, 1)
        after_real = self._call_of(row, 1, real_first=True)
        if not _same(_without_hidden(alone), _without_hidden(after_real)):
            name = self._streamed.blocks[1]
            got = "arguments that depend on what the block before computed"
            cure = "Choose a method that needs no calibration: this model's blocks cannot run one by one."
            raise ModelError(Fault(name, "blocks that pass on hidden states only", got, cure))

    def _call_of(self, row: Row, index: int, *, real_first: bool = False) -> Call:
        """The arguments the model calls block ``index`` with."""

        def hand_on(at: int, call: Call) -> Tensor:
            if at == index:
                raise _Stop(call)
            return _hidden(call)

        with self._stand_ins(hand_on, skip=int(real_first)):
            try:
                self._run(row)
            except _Stop as stop:
                return stop.call
        name = self._streamed.blocks[index]
        cure = "Choose a method that needs no calibration."
        raise ModelError(Fault(name, "a block that the model runs", "one that it never called", cure))

    @torch.no_grad()
    def _run(self, row: Row) -> None:
        inputs = {key: value.to(self._streamed.device) for key, value in row.items()}
        if refused := inputs.keys() - self._accepts.keys():
            cls = type(self._streamed.module).__name__
            cure = "Leave them out of the calibration rows."
            raise ModelError(Fault(cls, f"a model that takes {sorted(refused)}", "one that does not", cure))
        extra = {"use_cache": False} if "use_cache" in self._accepts else {}
        with self._blank_embeddings():
            self._streamed.module(**inputs, **extra)

    @contextmanager
    def _blank_embeddings(self) -> Iterator[None]:
        """Within, embeddings that are not in memory give zeros."""

        def zeros_like(module: nn.Embedding) -> Callable[[Tensor], Tensor]:
            width, dtype = module.embedding_dim, self._streamed.dtype
            return lambda input: torch.zeros(*input.shape, width, dtype=dtype, device=input.device)

        replaced: list[nn.Embedding] = [e for e in self._embeddings if e.weight.is_meta]
        try:
            for module in replaced:
                module.forward = zeros_like(module)  # type: ignore[method-assign,assignment]
            yield
        finally:
            for module in replaced:
                del module.forward

    @contextmanager
    def _stand_ins(self, hand_on: Callable[[int, Call], Tensor], skip: int = 0) -> Iterator[None]:
        """Within, blocks from ``skip`` on return what ``hand_on(index, call)`` does, in a block's form."""

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = hand_on(index, (args, kwargs))
                return hidden if self._num_extras is None else (hidden, *[None] * self._num_extras)

            return forward

        replaced: list[nn.Module] = []
        try:
            for index, block in enumerate(self._blocks[skip:], skip):
                block.forward = forward_of(index)  # an attribute of the instance hides the class's method
                replaced.append(block)
            yield
        finally:
            for block in replaced:
                del block.forward


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    found: Tensor = args[0] if args else kwargs[HIDDEN]
    return found


def _with_hidden(call: Call, hidden: Tensor) -> Call:
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, HIDDEN: hidden})


def _without_hidden(call: Call) -> Call:
    args, kwargs = call
    return (args[1:], kwargs) if args else (args, {k: v for k, v in kwargs.items() if k != HIDDEN})


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return type(one) is type(other) and (one == other or hasattr(one, "__dict__"))
