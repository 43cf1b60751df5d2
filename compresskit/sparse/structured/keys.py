"""Which keys of a configuration set a width, found by trying: with the right ones a model of one block is the
same but for twice that width. Twice, so that a model with two groups of heads can be tried as well; the
trial has no weights.

A key is never taken for its name, with one exception: where the size of a head is not in a configuration, it
follows from the width and the number of heads, and is written down as ``head_dim``, as transformers calls it.

Shapes: N = inputs of a reader, D = hidden size, U = units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.skeleton import skeleton_of
from compresskit.sparse.structured.coupling import Coupling, couplings_of_one
from compresskit.sparse.structured.resize import Changes, is_int, resized

HEAD_DIM = "head_dim"
MAX_HIDDEN_KEYS = 3

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Keys:
    """What a configuration says for a number of units.

    Attributes:
        scaled: keys, and their value for one unit.
        pinned: keys that must not follow from others any more, and their value.
    """

    scaled: tuple[tuple[str, int], ...]
    pinned: tuple[tuple[str, int], ...] = ()

    def changes(self, units: int) -> Changes:
        """What to write for ``units``."""
        return {**dict(self.pinned), **{key: value * units for key, value in self.scaled}}


@dataclass(frozen=True)
class Trial:
    """A model of one block whose configuration is tried out.

    Attributes:
        config: of the model of one block; not changed.
        directory: where code of the model's own would lie.
        trust_remote_code: whether that code may run.
    """

    config: Any
    directory: Path
    trust_remote_code: bool = False

    @cached_property
    def values(self) -> dict[str, Any]:
        """The configuration as plain data."""
        data: dict[str, Any] = self.config.to_dict()
        return data

    @cached_property
    def anatomy(self) -> Anatomy:
        """Of the model of one block."""
        return self._anatomy_of(self.config)

    def with_changes(self, changes: Changes) -> Trial:
        """Another trial, whose configuration has ``changes``."""
        return Trial(resized(self.config, changes), self.directory, self.trust_remote_code)

    def shapes(self, changes: Changes) -> Shapes | None:
        """Every parameter's shape with ``changes``; None where they make no model."""
        try:
            return self._anatomy_of(resized(self.config, changes)).parameter_shapes
        except Exception:  # whatever a model's constructor raises over a wrong value
            return None

    def has_heads(self, changes: Changes, heads: Coupling, units: int) -> bool:
        """Whether ``changes`` make a model that runs and has ``units`` groups of heads, as ``heads`` are.

        Without some of its units its layers are those of ``heads``; fixed parts that heads are dealt out to
        would shift what stays.
        """
        try:
            config, trust = resized(self.config, changes), self.trust_remote_code
            found = couplings_of_one(config, self.directory, heads_only=True, trust_remote_code=trust).heads
        except Exception:
            return False
        return len(found) == 1 and found[0].units == units and _is_larger(found[0], heads)

    def _anatomy_of(self, config: Any) -> Anatomy:
        return anatomy_of(skeleton_of(config, self.directory, trust_remote_code=self.trust_remote_code))


def _is_larger(large: Coupling, small: Coupling) -> bool:
    """Whether ``large`` without some of its units is ``small``: the first stay, then such as come."""
    if (large.reader, large.size, large.makers.keys()) != (small.reader, small.size, small.makers.keys()):
        return False
    chance = torch.randperm(large.units, generator=torch.Generator().manual_seed(0))
    for stay_U in (torch.arange(small.units), chance[: small.units].sort().values):
        number_U = torch.full((large.units,), -1).index_copy(0, stay_U, torch.arange(small.units))
        for name, owner_F in large.makers.items():
            left_F = number_U[owner_F]
            if not torch.equal(left_F[left_F >= 0], small.makers[name]):
                return False
    return True


def coupled_axes(anatomy: Anatomy, coupling: Coupling) -> dict[str, int]:
    """Each parameter of the one block that units lie in, and along which of its axes."""
    axes = {}
    for name in coupling.makers:
        linear = anatomy.linears[f"{anatomy.blocks[0]}.{name}"]
        axes[f"{linear.name}.weight"] = 1 if linear.transposed else 0
        if linear.has_bias:
            axes[f"{linear.name}.bias"] = 0
    reader = anatomy.linears[f"{anatomy.blocks[0]}.{coupling.reader}"]
    axes[f"{reader.name}.weight"] = 0 if reader.transposed else 1
    return axes


def find_ffn_keys(trial: Trial, coupling: Coupling) -> Keys | None:
    """The key that sets how many neurons there are: one that holds the number, or null where it follows."""
    width = coupling.units
    wanted = _doubled(trial.anatomy, coupling)
    for key in [*_ints(trial, width), *(k for k, v in trial.values.items() if v is None)]:
        if trial.shapes({key: 2 * width}) == wanted:
            return Keys(((key, 1),))
    return None


def find_head_keys(trial: Trial, coupling: Coupling) -> Keys | None:
    """The keys that set how many heads there are while nothing else changes; None where there are none."""
    wanted = _doubled(trial.anatomy, coupling)
    for keys in _head_candidates(trial, coupling):
        changes = keys.changes(2 * coupling.units)
        if trial.shapes(changes) == wanted and trial.has_heads(changes, coupling, 2 * coupling.units):
            return keys
    return None


def find_hidden_keys(
    trial: Trial, width: int, heads: Coupling, others: Sequence[Coupling], *, follow: bool
) -> tuple[Keys, Keys | None, dict[str, tuple[int, ...]]] | None:
    """The keys that set the hidden size, where the size of a head and all other widths stay.

    Args:
        trial: other widths that could follow from the hidden size are pinned in it.
        width: D.
        heads: the groups of heads.
        others: couplings whose widths stay.
        follow: the number of heads follows the hidden size, since their outputs together are as wide.

    Returns:
        The keys of the hidden size; those of the heads, where they follow; the axes of each parameter of the
        one block, and of what is outside it, that are hidden channels. None where there are no such keys.
    """
    held = {(n, a) for coupling in others for n, a in coupled_axes(trial.anatomy, coupling).items()}
    moving = {(n, a) for n, a in coupled_axes(trial.anatomy, heads).items()}
    if not follow:
        held, moving = held | moving, set()
    names = _ints(trial, width)
    followers: list[Keys | None] = [None]
    if follow:
        followers = list(_head_candidates(trial, heads, pins=False, but=names))
    for count in range(1, min(len(names), MAX_HIDDEN_KEYS) + 1):
        for chosen in combinations(names, count):
            keys = Keys(tuple((name, 1) for name in chosen))
            for head_keys in followers:
                changes = keys.changes(2 * width)
                changes |= head_keys.changes(2 * heads.units) if head_keys else {}
                axes = _hidden_axes(trial, changes, width, held, moving)
                if axes is None or not _is_read_and_written(trial.anatomy, heads, axes):
                    continue
                units = heads.units * (2 if follow else 1)
                if trial.has_heads(changes, heads, units):
                    return keys, head_keys, axes
    return None


def _hidden_axes(
    trial: Trial, changes: Changes, width: int, held: set[tuple[str, int]], moving: set[tuple[str, int]]
) -> dict[str, tuple[int, ...]] | None:
    """The axes that grow from ``width`` to twice that; None if anything else changes but ``moving`` ones."""
    before, after = trial.anatomy.parameter_shapes, trial.shapes(changes)
    if after is None or after.keys() != before.keys():
        return None
    found: dict[str, tuple[int, ...]] = {}
    for name, old in before.items():
        if len(old) != len(after[name]):
            return None
        hidden = []
        for axis, (a, b) in enumerate(zip(old, after[name], strict=True)):
            if a == b and (name, axis) not in moving:
                continue
            if b != 2 * a or (name, axis) in held:
                return None
            if (name, axis) not in moving:
                if a != width:
                    return None
                hidden.append(axis)
        if hidden:
            found[name] = tuple(hidden)
    return found


def _is_read_and_written(anatomy: Anatomy, heads: Coupling, axes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether attention writes what ``axes`` are, and all who make heads read it."""
    block = anatomy.blocks[0]
    reader = anatomy.linears[f"{block}.{heads.reader}"]
    if (1 if reader.transposed else 0) not in axes.get(f"{reader.name}.weight", ()):
        return False
    makers = [anatomy.linears[f"{block}.{name}"] for name in heads.makers]
    return all((0 if m.transposed else 1) in axes.get(f"{m.name}.weight", ()) for m in makers)


def _head_candidates(
    trial: Trial, coupling: Coupling, *, pins: bool = True, but: Sequence[str] = ()
) -> Iterator[Keys]:
    """One key or two that may count heads, with the size of a head as it is; none of ``but``."""
    width, units = coupling.units * coupling.size, coupling.units
    counts = {
        key: value
        for key, value in trial.values.items()
        if is_int(value) and value > 0 and value % units == 0 and width % value == 0 and key not in but
    }
    stated: Any = trial.values.get(HEAD_DIM)
    for number in (1, 2):
        for names in combinations(counts, number):
            scaled = tuple((name, counts[name] // units) for name in names)
            sizes = [width // counts[name] for name in names]
            if not pins:
                yield Keys(scaled)
            elif is_int(stated):
                yield Keys(scaled, ((HEAD_DIM, int(stated)),))
            else:
                yield from (Keys(scaled, ((HEAD_DIM, size),)) for size in dict.fromkeys(sizes))


def _doubled(anatomy: Anatomy, coupling: Coupling) -> Shapes:
    """The shapes of the model of one block with twice the units."""
    shapes = dict(anatomy.parameter_shapes)
    for name, axis in coupled_axes(anatomy, coupling).items():
        shape = list(shapes[name])
        shape[axis] *= 2
        shapes[name] = tuple(shape)
    return shapes


def _ints(trial: Trial, wanted: int) -> list[str]:
    return [key for key, value in trial.values.items() if is_int(value) and value == wanted]
