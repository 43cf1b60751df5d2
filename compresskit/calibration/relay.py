"""Run a model around its blocks, and one block with the arguments that the model would give it.

What a block is called with besides its hidden states (masks, rotary embeddings, positions) differs between
families, and between the blocks of a model with sliding windows. It is never stored: the model itself is run
with all blocks replaced by stand-ins that hand their input on, and stopped at the block in question. That
costs a mask, little beside a block, and no memory; it is spared where the last batch was of the same shape
and the tokens themselves make no difference to any. While the token embedding is not in memory, zeros of the
shape of its results stand for them: masks and positions do not depend on what they hold, which is tried.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.calibration.rows import Row
from compresskit.errors import Fault, ModelError
from compresskit.modeling.forwards import computing
from compresskit.modeling.streaming import StreamedModel

HIDDEN = "hidden_states"
NO_CALIBRATION = "Choose a method that needs no calibration."
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
        tables = [streamed.module.get_submodule(name).weight for name in streamed.tables]
        self._embeddings = [
            part
            for part in streamed.module.modules()
            if isinstance(part, nn.Embedding) and any(part.weight is table for table in tables)
        ]
        self._accepts = inspect.signature(streamed.module.forward).parameters
        self._num_extras: int | None = None
        self._alike: set[int] = set()
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
        rest = _but_tokens(row)
        if self._last is None or self._last[0] != index or not _same(self._last[1], rest):
            self._last = None  # before another is made
            call = self._call_of(row, index)
            if index not in self._alike:
                return _with_hidden(call, hidden)
            self._last = index, rest, _with_hidden(call, hidden.new_empty(0))
        return _with_hidden(self._last[2], hidden)

    def compare(self, rows: Sequence[Row]) -> None:
        """Find out which blocks the model calls alike for all of ``rows`` that have one shape.

        Their arguments are then made once for each run of rows of one shape, the first following the last.
        Call after :meth:`learn`; one run of the stand-ins tells of all blocks.
        """
        self._alike, self._last = set(range(len(self._blocks))), None
        former: tuple[Row, dict[int, Any]] | None = None
        for row in (*rows, rows[0]):
            rest, calls = _but_tokens(row), self._calls(row)
            self._alike &= calls.keys()
            if former and _same(former[0], rest):
                _, others = former
                self._alike = {at for at in self._alike if _same(others[at], calls[at], known_only=True)}
            if not self._alike:
                return
            former = rest, calls

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

    def require_independence(self, row: Row) -> None:
        """What blocks are called with besides hidden states has to be the same with blank embeddings.

        Args:
            row: to try; the token embedding must be in memory.

        Raises:
            ModelError: it is not, such as where each block is given an embedding of its own.
        """
        real = self._calls(row)
        with computing(map(self._blank, self._embeddings)):
            blank = self._calls(row)
        for index, name in enumerate(self._streamed.blocks):
            if not _same(real.get(index), blank.get(index)):
                got = "arguments that depend on the token embedding"
                raise ModelError(Fault(name, "blocks that are given hidden states only", got, NO_CALIBRATION))

    def learn(self, row: Row) -> None:
        """Learn from block 0, which must be in memory, what form the blocks' results have.

        Raises:
            ModelError: blocks hand each other more than hidden states, so they cannot run one by one.
        """
        args, kwargs = self._call_of(row, 0)
        shape, hidden = row["input_ids"].shape, _hidden((args, kwargs)).shape
        if hidden[:-1] != shape:
            got = f"{tuple(hidden)} for {tuple(shape)} tokens"
            raise ModelError(Fault(self._streamed.blocks[0], "hidden states (B, T, D)", got, NO_CALIBRATION))
        with torch.no_grad():
            output = self._blocks[0](*args, **kwargs)
        self._num_extras = None if isinstance(output, Tensor) else len(output) - 1
        if len(self._blocks) == 1:
            return
        alone = self._call_of(row, 1)
        after_real = self._call_of(row, 1, real_first=True)
        if not _same(_without_hidden(alone), _without_hidden(after_real)):
            name = self._streamed.blocks[1]
            got = "arguments that depend on what the block before computed"
            cure = "Choose a method that needs no calibration: this model's blocks cannot run one by one."
            raise ModelError(Fault(name, "blocks that pass on hidden states only", got, cure))

    def _calls(self, row: Row) -> dict[int, Any]:
        """What each block is called with, hidden states left out."""
        found: dict[int, Any] = {}

        def note(at: int, call: Call) -> Tensor:
            found[at] = _without_hidden(call)
            if at == len(self._blocks) - 1:
                raise _Stop(call)
            return _hidden(call)

        with self._stand_ins(note), suppress(_Stop):
            self._run(row)
        return found

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
        got = "one that it never called"
        raise ModelError(
            Fault(self._streamed.blocks[index], "a block that the model runs", got, NO_CALIBRATION)
        )

    @torch.no_grad()
    def _run(self, row: Row) -> None:
        inputs = {key: value.to(self._streamed.device) for key, value in row.items()}
        if refused := inputs.keys() - self._accepts.keys():
            cls = type(self._streamed.module).__name__
            cure = "Leave them out of the calibration rows."
            raise ModelError(Fault(cls, f"a model that takes {sorted(refused)}", "one that does not", cure))
        extra = {"use_cache": False} if "use_cache" in self._accepts else {}
        with computing(self._blank(e) for e in self._embeddings if e.weight.is_meta):
            self._streamed.module(**inputs, **extra)

    def _blank(self, embedding: nn.Embedding) -> tuple[nn.Embedding, Callable[[Tensor], Tensor]]:
        """``embedding``, and what gives zeros of the shape of its results."""
        width, dtype = embedding.embedding_dim, self._streamed.dtype
        return embedding, lambda input: torch.zeros(*input.shape, width, dtype=dtype, device=input.device)

    def _stand_ins(
        self, hand_on: Callable[[int, Call], Tensor], skip: int = 0
    ) -> AbstractContextManager[None]:
        """Within, blocks from ``skip`` on return what ``hand_on(index, call)`` does, in a block's form."""

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = hand_on(index, (args, kwargs))
                return hidden if self._num_extras is None else (hidden, *[None] * self._num_extras)

            return forward

        blocks = enumerate(self._blocks[skip:], skip)
        return computing((block, forward_of(index)) for index, block in blocks)


def _but_tokens(row: Row) -> Row:
    """What ``row`` has besides its tokens, and their shape."""
    shape = torch.tensor(row["input_ids"].shape)
    return {"shape": shape, **{key: value for key, value in row.items() if key != "input_ids"}}


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


def _same(one: Any, other: Any, *, known_only: bool = False) -> bool:
    """Whether two arguments are equal; objects of one type count as equal unless ``known_only``."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(
            _same(a, b, known_only=known_only) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k], known_only=known_only) for k in one)
    is_object = not known_only and hasattr(one, "__dict__")
    return type(one) is type(other) and bool(is_object or one == other)
