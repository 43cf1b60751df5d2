"""A stage of a pipeline: the model's own forward, in which the blocks of other stages are stand-ins.

Positions reach each stage, and the model's own code makes masks and rotations of them there, so whatever a
model does around its blocks it does in every stage. That the stages together compute what the whole model
does is found out by trying, before any weight is given up.

Shapes: B = rows, T = tokens of a row, D = hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, PlanError
from compresskit.modeling.anatomy import anatomy_of, tied_groups
from compresskit.training.redirect import AUTOCAST

DOCUMENT = 6
"""Tokens of each of the two documents that are tried."""
TOLERANCE = 1e-6
"""Relative, of the norm of what stages make: the same products of the same numbers, in float32."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What of a model comes before its blocks, and what after them.

    Attributes:
        blocks: names, in the order they are called.
        embeddings: name of the token embedding.
        head: name of the output projection.
        before: other modules with parameters that are called before the first block.
        after: such modules that are called after the last.
        in_tuples: whether a block returns its hidden states first in a tuple.
        width: of the hidden states.
    """

    blocks: tuple[str, ...]
    embeddings: str
    head: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    in_tuples: bool
    width: int

    def costs(self, model: nn.Module) -> tuple[list[float], float]:
        """Weights that each token is multiplied by, of each block, and of the output projection."""
        return [_matrices(model, name) for name in self.blocks], _matrices(model, self.head)

    def stage_of(self, module: str, stages: tuple[range, ...]) -> int:
        """Which stage has the parameters of ``module``."""
        for number, block in enumerate(self.blocks):
            if module == block or module.startswith(f"{block}."):
                return next(i for i, own in enumerate(stages) if number in own)
        return len(stages) - 1 if module in (self.head, *self.after) else 0


def layout_of(model: nn.Module) -> Layout:
    """Run a decoder on a few tokens and see what is called when.

    Raises:
        PlanError: the model has no blocks in a row, or parameters that no call reaches.
    """
    anatomy = anatomy_of(model)
    if not anatomy.blocks or anatomy.embeddings is None or anatomy.head is None:
        raise _refused(model, "blocks, an embedding and an output projection")
    inside = tuple(f"{block}." for block in anatomy.blocks)
    known = {*anatomy.blocks, anatomy.embeddings, anatomy.head}
    others = [
        name
        for name, module in model.named_modules()
        if name not in known and not name.startswith(inside) and any(True for _ in _own(module))
    ]
    called: list[str] = []
    tuples: set[bool] = set()
    handles: list[Any] = []
    for name in (*anatomy.blocks, *others):

        def see(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            called.append(name)
            if name in known:
                tuples.add(isinstance(output, tuple))

        handles.append(model.get_submodule(name).register_forward_hook(see))
    try:
        states = _probed(model)
    finally:
        for handle in handles:
            handle.remove()
    in_order = [name for name in called if name in known]
    if in_order != list(anatomy.blocks) or len(tuples) != 1 or set(others) - set(called):
        raise _refused(model, "blocks that are called once each, in order, and nothing beside them")
    first, last = (called.index(anatomy.blocks[i]) for i in (0, -1))
    return Layout(
        blocks=anatomy.blocks,
        embeddings=anatomy.embeddings,
        head=anatomy.head,
        before=tuple(name for name in others if called.index(name) < first),
        after=tuple(name for name in others if called.index(name) > last),
        in_tuples=tuples.pop(),
        width=states.shape[-1],
    )


class StandIn(nn.Module):
    """In the place of a module that another stage has: what it is given it gives on.

    Args:
        replaced: whose plain attributes, such as the kind of its attention, the model's forward may read.
        in_tuple: whether what is given on is put into a tuple.
    """

    def __init__(self, replaced: nn.Module, *, in_tuple: bool = False) -> None:
        super().__init__()
        for name, value in vars(replaced).items():
            if isinstance(value, (bool, int, float, str)) and name != "training":
                setattr(self, name, value)
        self._in_tuple = in_tuple
        self.given: Tensor | None = None
        self.seen: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, or what was ``given`` instead; what comes is kept as ``seen``."""
        self.seen = args[0] if args else next(iter(kwargs.values()))
        made = self.seen if self.given is None else self.given
        return (made,) if self._in_tuple else made


class Stage(nn.Module):
    """Some consecutive blocks of a model, and what comes before the first or after the last.

    Args:
        model: whole; a skeleton of it is made, whose parameters are the same objects. Not changed.
        layout: of the model.
        index: of the stage.
        stages: the blocks of each.
        precision: that it computes in: ``fp32`` or ``bf16``.

    Attributes:
        ends: in the last stage: a scalar of the batch, by way of a forward of ``model``.
    """

    ends: Callable[[dict[str, Tensor]], Tensor]

    def __init__(
        self, model: nn.Module, layout: Layout, index: int, stages: tuple[range, ...], precision: str
    ) -> None:
        super().__init__()
        self.is_first, self.is_last = index == 0, index == len(stages) - 1
        self._precision = precision
        shared = [*model.parameters(), *model.buffers()]
        self.model: nn.Module = deepcopy(model, {id(tensor): tensor for tensor in shared})
        own = stages[index]
        keep_only(self.model, layout, own, is_first=self.is_first, is_last=self.is_last)
        self._entry = None if self.is_first else self._block(layout, own.start - 1)
        self._exit = None if self.is_last else self._block(layout, own.stop)

    def _block(self, layout: Layout, number: int) -> StandIn:
        stand_in = self.model.get_submodule(layout.blocks[number])
        assert isinstance(stand_in, StandIn)
        return stand_in

    def states(self, given: Tensor, position_ids: Tensor) -> Tensor:
        """What the blocks make of the ids (B, T) or of the hidden states (B, T, D) before them."""
        base = cast(nn.Module, self.model.base_model)
        kind, narrow = given.device.type, AUTOCAST.get(self._precision)
        if self._entry is None:
            fed = {"input_ids": given}
        else:
            # What is made of these the entry drops: it gives the blocks what came from the stage before.
            fed, self._entry.given = {"inputs_embeds": given.detach()}, given
        try:
            with torch.autocast(kind, dtype=narrow, enabled=narrow is not None):
                made = base(**fed, position_ids=position_ids, use_cache=False)[0]
            if self._exit is not None:
                # Ranks that receive them know their shape and type beforehand.
                made = cast(Tensor, self._exit.seen).float().contiguous()
            return cast(Tensor, made)
        finally:
            for stand_in in (self._entry, self._exit):
                if stand_in is not None:
                    stand_in.given = stand_in.seen = None

    def forward(self, given: Tensor, *, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """What the next stage is given; of the last stage what :attr:`ends` makes of the batch."""
        if not self.is_last:
            return self.states(given, position_ids)
        with self._continuing(given):
            return self.ends({"input_ids": input_ids, "position_ids": position_ids, "labels": labels})

    @contextmanager
    def _continuing(self, given: Tensor) -> Iterator[None]:
        """While it lasts the last stage's base model goes on from ``given``, whatever ids it is fed."""
        base, entry = cast(nn.Module, self.model.base_model), self._entry
        assert entry is not None
        whole = base.forward

        def forward(input_ids: Tensor, **kwargs: Any) -> Any:
            return whole(inputs_embeds=given.detach(), **kwargs)

        entry.given, base.forward = given, forward  # type: ignore[assignment]
        try:
            yield
        finally:
            del base.forward
            entry.given = entry.seen = None


def keep_only(model: nn.Module, layout: Layout, own: Iterable[int], *, is_first: bool, is_last: bool) -> None:
    """Put stand-ins into ``model`` for what other stages have; what comes before the blocks may run along."""
    blocks = set(own)
    for number, name in enumerate(layout.blocks):
        if number not in blocks:
            stand_in = StandIn(model.get_submodule(name), in_tuple=layout.in_tuples)
            model.set_submodule(name, stand_in)
    gone: tuple[str, ...] = () if is_first else (layout.embeddings,)
    gone += () if is_last else (*layout.after, layout.head)
    for name in gone:
        model.set_submodule(name, StandIn(model.get_submodule(name)))


def require_stages_compose(model: nn.Module, layout: Layout, stages: tuple[range, ...]) -> None:
    """Raise PlanError unless the stages, one after another, make of some tokens what the model does."""
    with torch.no_grad():
        expected = _probed(model)
        parts = [Stage(model, layout, index, stages, "fp32").eval() for index in range(len(stages))]
        ids, positions = _documents(model)
        states = ids
        try:
            for part in parts:
                states = part.states(states, positions)
        except Exception as error:  # whatever a model's code raises over inputs it was not written for
            raise _refused(model, f"a forward that can begin at any block ({error})") from error
    if states.shape != expected.shape or not (states - expected).norm() <= TOLERANCE * expected.norm():
        raise _refused(model, "blocks that see nothing but the states before them and positions")


def _probed(model: nn.Module) -> Tensor:
    """Hidden states of two short documents in a row."""
    base, trains = cast(nn.Module, model.base_model), model.training
    ids, positions = _documents(model)
    model.eval()
    try:
        with torch.no_grad():
            return cast(Tensor, base(input_ids=ids, position_ids=positions, use_cache=False)[0])
    finally:
        model.train(trains)


def _documents(model: nn.Module) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    positions = torch.arange(DOCUMENT, device=device).repeat(2)[None]
    return torch.arange(2 * DOCUMENT, device=device)[None] + 1, positions


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _matrices(model: nn.Module, name: str) -> float:
    return float(sum(p.numel() for p in model.get_submodule(name).parameters() if p.dim() > 1))


def _refused(model: nn.Module, expected: str) -> PlanError:
    cure = "Set pipeline_stages to 1 and use strategy fsdp, which divides any model."
    return PlanError(Fault("pipeline_stages", f"a model with {expected}", type(model).__name__, cure))


def shared_by_ends(model: nn.Module, owner: Mapping[str, int], last: int) -> list[nn.Parameter]:
    """The parameters in training that both the first and the ``last`` stage have.

    Raises:
        PlanError: other stages share parameters.
    """
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), []
    for names in tied_groups(model):
        stages = {owner[name] for name in names}
        if len(stages) > 1 and stages != {0, last}:
            raise _refused(model, "blocks that share no weights")
        if len(stages) > 1 and parameters[names[0]].requires_grad:
            found.append(parameters[names[0]])
    return found


def owners(model: nn.Module, layout: Layout, stages: tuple[range, ...]) -> Mapping[str, int]:
    """Name of each tensor of the state dict -> the stage that has it."""
    names: Mapping[str, Any] = model.state_dict(keep_vars=True)
    return {name: layout.stage_of(name.rpartition(".")[0], stages) for name in names}
