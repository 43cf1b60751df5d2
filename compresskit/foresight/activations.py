"""What one pass holds besides weights, found by running a few blocks of the model on tensors without memory.

A fake tensor has a shape and no values, so the forward and the backward pass of four blocks of any width take
about a second. Blocks are alike: what four of them hold tells what any number of them does.

Shapes: B = rows, T = tokens of a row, D = hidden width, N = tokens that are predicted, V = vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.hooks import RemovableHandle

from compresskit.foresight.live import Live, gradient_bytes
from compresskit.modeling.skeleton import model_class
from compresskit.training.fields import TrainingFields
from compresskit.training.objective import LOSS, Head, Signal
from compresskit.training.redirect import redirected
from compresskit.training.surroundings import trainable

BLOCKS = 4
"""That are run."""
Prepare = Callable[[nn.Module], None]
"""What is done to a model before it trains, such as freezing it and adding adapters."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of a pass, in bytes that are neither weights nor gradients of other parts.

    Attributes:
        peak: the most while it lasts, beyond what was there when it began, its own gradients among it.
        kept: what is there more when it ends, without gradients; less where it is below zero.
        gradient: of its own parameters, whole.
    """

    peak: float
    kept: float
    gradient: float = 0.0

    def plus(self, other: Phase, factor: float = 1.0) -> Phase:
        """The sum with ``factor`` times the other."""
        return Phase(
            self.peak + factor * other.peak,
            self.kept + factor * other.kept,
            self.gradient + factor * other.gradient,
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        begin: before the first block: embeddings, positions, masks.
        block: the mean of the blocks, forward.
        head: after the last block, up to the loss.
        head_back: from the loss back to the last block.
        block_back: the mean of the blocks, backward.
        end: from the first block back to the embeddings.
    """

    begin: Phase
    block: Phase
    head: Phase
    head_back: Phase
    block_back: Phase
    end: Phase

    def plus(self, other: Pass, factor: float = 1.0) -> Pass:
        """Phase by phase."""
        names = self.__dataclass_fields__
        return Pass(**{name: getattr(self, name).plus(getattr(other, name), factor) for name in names})


@dataclass(frozen=True, slots=True)
class Predicting:
    """A next-token loss on every token, whose sizes are known without looking at labels."""

    needs_teacher: ClassVar[bool] = False

    def __call__(
        self, hidden_BTD: Tensor, head: Head, labels_BT: Tensor, signal: Signal | None
    ) -> Mapping[str, Tensor]:
        """See ``compresskit.training.objective.Objective.__call__``."""
        hidden_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1]).clone()
        labels_N = labels_BT[:, 1:].reshape(-1).clone()
        run: Any = torch.ops.compresskit.linear_cross_entropy
        return {LOSS: run(hidden_ND, head.weight_VD, head.bias_V, labels_N, head.softcap, 0, True)[0]}


def traced(
    config: Any,
    directory: Path,
    fields: TrainingFields,
    *,
    rows: int,
    tokens: int,
    blocks: int = BLOCKS,
    prepare: Prepare | None = None,
    accumulates: bool = False,
    trust_remote_code: bool = False,
) -> Pass:
    """Run a few blocks of a causal language model forward and backward, without memory.

    Args:
        config: of the model; not changed.
        directory: of the model, for code of its own.
        fields: precision, and what is kept of activations.
        rows: B.
        tokens: T.
        blocks: to run, at least 2.
        prepare: what is done to the model before it trains.
        accumulates: whether there are gradients already, to which the pass adds.
        trust_remote_code: whether that code may run.

    Returns:
        The phases of one pass; what the fused loss holds inside of itself is not in them.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of checkpointing and masks, about tensors that are not real
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = _model(config, directory, blocks, torch.float32, trust_remote_code)
        if prepare is not None:
            prepare(model)
        model.train()
        stack.enter_context(trainable(model, fields))
        stack.enter_context(redirected(model, Predicting(), precision=fields.precision))
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        had = [p for p in model.parameters() if p.requires_grad and accumulates]
        for parameter in had:
            parameter.grad = torch.zeros_like(parameter)
        there = [p.grad for p in had if p.grad is not None]
        live = Live([*model.parameters(), *model.buffers(), *there, ids])
        with live:
            return _timed(model, ids, live)


def forward_bytes(
    config: Any,
    directory: Path,
    *,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> float:
    """The most that a forward pass without gradients holds besides weights, such as a teacher's.

    Args:
        config: of the model; not changed.
        directory: of the model, for code of its own.
        rows: B.
        tokens: T.
        dtype: of its weights.
        trust_remote_code: whether that code may run.
    """
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        warnings.simplefilter("ignore")
        model: Any = _model(config, directory, 2, dtype, trust_remote_code).eval()
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        with Live([*model.parameters(), *model.buffers(), ids]) as live:
            model.base_model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
            return float(live.peak_bytes)


def _model(
    config: Any, directory: Path, blocks: int, dtype: torch.dtype, trust_remote_code: bool
) -> nn.Module:
    """The first few blocks of the model with all of what is outside of them."""
    small = shortened(config, blocks)
    cls: Any = model_class(small, directory, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        made: nn.Module = cls._from_config(small, dtype=dtype)
    made.float = lambda: made  # type: ignore[method-assign]  # it is already, and fakes cannot be swapped
    return made


def shortened(config: Any, blocks: int) -> Any:
    """``config`` with so many blocks, the first ones."""
    whole = depth(config)
    names = getattr(config, "attribute_map", {})
    data = config.to_dict()
    for key, value in data.items():
        if isinstance(value, list) and len(value) == whole and key != "architectures":
            data[key] = value[:blocks]
    data |= {names.get("num_hidden_layers", "num_hidden_layers"): min(blocks, whole)}
    return type(config).from_dict(deepcopy(data))


def depth(config: Any) -> int:
    """Blocks of a model with such a configuration."""
    return int(config.get_text_config().num_hidden_layers)


class _Marks:
    """Where each phase ends, as hooks see it."""

    def __init__(self, model: nn.Module, live: Live) -> None:
        self._model, self._live = model, live
        self.levels: list[tuple[float, float, float]] = []
        self._backward, self._had = False, gradient_bytes(model)
        live.mark()

    def mark(self) -> None:
        """A phase ends here: what was alive at most, what is alive, and the gradients that are new."""
        live, gradients = self._live, gradient_bytes(self._model) - self._had
        self.levels.append((live.peak_bytes, live.bytes, gradients))
        live.mark()

    def begins(self, *_: Any) -> None:
        """A block is called; when it is computed again in the backward pass that is no phase."""
        if not self._backward:
            self.mark()

    def ends(self, block: nn.Module, given: Any, made: Any) -> None:
        """A block has been computed; when its output's gradient is there, the next phase has ended."""
        states = made[0] if isinstance(made, tuple) else made
        if not self._backward and states.requires_grad:
            states.register_hook(lambda _: self.mark())

    def first(self, block: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Of the first block the gradient of its input ends the last of the blocks."""
        states = given[0] if given else named["hidden_states"]
        if not self._backward and states.requires_grad:
            states.register_hook(lambda _: self.mark())

    def turn(self) -> None:
        """The forward pass is done."""
        self._backward = True
        self.mark()


def _timed(model: nn.Module, ids: Tensor, live: Live) -> Pass:
    """One pass of a redirected model, phase by phase."""
    from compresskit.modeling.anatomy import anatomy_of

    blocks = [model.get_submodule(name) for name in anatomy_of(model).blocks]
    marks = _Marks(model, live)
    with _hooked(blocks, marks):
        positions, labels = torch.zeros_like(ids), torch.zeros_like(ids)
        loss = model(input_ids=ids, position_ids=positions, labels=labels)[LOSS]
        marks.turn()
        loss.backward()
        marks.mark()
    return _passed(marks.levels, len(blocks))


@contextmanager
def _hooked(blocks: list[nn.Module], marks: _Marks) -> Iterator[None]:
    handles: list[RemovableHandle] = [blocks[0].register_forward_pre_hook(marks.first, with_kwargs=True)]
    for block in blocks:
        handles.append(block.register_forward_pre_hook(marks.begins))
        handles.append(block.register_forward_hook(marks.ends))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passed(levels: list[tuple[float, float, float]], blocks: int) -> Pass:
    """Phases from what was alive at their ends.

    ``levels`` begin with the begin of each block, then the end of the forward pass, then backward: the head,
    each block from the last to the first, and the end. Where nothing before the first block takes a gradient
    there is no mark for that block's end, which is then the end of all.
    """
    found: list[Phase] = []
    alive = gradients = 0.0
    for peak, now, gradient in levels:
        before = alive - gradients
        found.append(Phase(peak - alive, now - gradient - before, gradient - gradients))
        alive, gradients = now, gradient
    # The first block's begin ends the phase before it; the last block and the head share one.
    forward, backward = found[: blocks + 1], found[blocks + 1 :]
    if len(backward) == blocks + 1:
        backward.append(Phase(0.0, 0.0))
    middle, middle_back = forward[1:-1], backward[1:-1]
    block = _mean(middle)
    last = forward[-1]  # the last block and the head after it
    head = Phase(max(last.peak - block.kept, 0.0), last.kept - block.kept, 0.0)
    return Pass(forward[0], block, head, backward[0], _mean(middle_back), backward[-1])


def stretched(two: Pass, four: Pass, blocks: int) -> Pass:
    """The pass of a model of so many blocks, from those of two and of four of them.

    What all blocks keep together grows by as much with each; their mean need not stay, since the first and
    the last have neighbours of another kind.
    """
    longer = four.plus(four.plus(two, -1.0), (blocks - 4) / 2)

    def mean(name: str) -> Phase:
        few, more, peak = getattr(two, name), getattr(four, name), getattr(longer, name).peak
        kept, gradient = (
            (4 * many + (4 * many - 2 * some) * (blocks - 4) / 2) / blocks
            for some, many in ((few.kept, more.kept), (few.gradient, more.gradient))
        )
        return Phase(peak, kept, gradient)

    return replace(longer, block=mean("block"), block_back=mean("block_back"))


def _mean(phases: list[Phase]) -> Phase:
    total = Phase(0.0, 0.0)
    for phase in phases:
        total = total.plus(phase)
    count = len(phases)
    return Phase(max(phase.peak for phase in phases), total.kept / count, total.gradient / count)
