"""The widths of a model that may be cut, and which entries of which parameters belong to a unit of each.

Shapes: N = entries of a parameter along an axis, D = hidden size, U = units.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import Fault, InputError, ModelError, PatternError
from compresskit.modeling.anatomy import Anatomy
from compresskit.sparse.structured.coupling import Coupling, Couplings, find_couplings
from compresskit.sparse.structured.keys import (
    Keys,
    Trial,
    coupled_axes,
    find_ffn_keys,
    find_head_keys,
    find_hidden_keys,
)
from compresskit.sparse.structured.resize import Changes, resized, with_blocks

FFN, HEADS, HIDDEN = "ffn", "heads", "hidden"
WIDTHS = (FFN, HEADS, HIDDEN)
UNITS = {FFN: "neurons", HEADS: "groups of heads", HIDDEN: "hidden channels"}
OTHERWISE = "Cut layers only, or another model."


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One axis of a parameter: the unit (N,) that each of its entries belongs to."""

    kind: str
    axis: int
    owner_N: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Dimension:
    """One width.

    Attributes:
        kind: ``ffn`` (a unit is a neuron), ``heads`` (a key/value head and the query heads that share it) or
            ``hidden`` (a channel of the residual stream).
        units: U, in each block, or of the whole model for ``hidden``.
        size: entries of the width that make a unit.
        parts: query heads in a unit of ``heads``; 1 for others.
        keys: of the configuration.
        readers: layers of a block that read these units, names relative to the block.
    """

    kind: str
    units: int
    size: int
    parts: int
    keys: Keys
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Dimensions:
    """The widths found in one model.

    Attributes:
        widths: by kind; those that were asked for.
        axes: of each parameter; the name of one in a block begins with a dot and lacks the block's.
        heads_follow: the outputs of all heads are as wide as the hidden size, whatever the configuration, so
            that one cannot change without the other.
        missing: widths that were optional and are not there, and why.
    """

    widths: Mapping[str, Dimension]
    axes: Mapping[str, tuple[Axis, ...]]
    heads_follow: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)

    def axes_of(self, name: str, anatomy: Anatomy) -> tuple[Axis, ...]:
        """The axes of parameter ``name`` along which a width lies."""
        return self.axes.get(name.removeprefix(anatomy.block_of(name) or ""), ())

    def changes(self, units: Mapping[str, int]) -> Changes:
        """What to change in the configuration for so many ``units`` of each kind."""
        changes: Changes = {}
        for kind in reversed(WIDTHS):  # what pins another width stands back where that one is cut too
            if kind in units:
                changes |= self.widths[kind].keys.changes(units[kind])
        return changes


def find_dimensions(
    wanted: Collection[str],
    config: Any,
    anatomy: Anatomy,
    directory: Path,
    *,
    optional: Collection[str] = (),
    trust_remote_code: bool = False,
) -> Dimensions:
    """Find widths of a model; reads no weight.

    Args:
        wanted: of :data:`WIDTHS`.
        config: of the model; not changed.
        anatomy: of the model.
        directory: where code of the model's own would lie.
        optional: widths to find where they can be found.
        trust_remote_code: whether that code may run.

    Returns:
        Those widths. With ``hidden`` the heads are among them where they follow it.

    Raises:
        ModelError: the blocks differ or cannot be run, or no key of the configuration sets a width.
        PatternError: units cannot be told apart, or one cannot be cut without the other.
    """
    couplings = find_couplings(config, anatomy, directory, trust_remote_code=trust_remote_code)
    one = with_blocks(config, anatomy, directory, (0,), trust_remote_code=trust_remote_code)
    finder = _Finder(Trial(resized(config, one), directory, trust_remote_code), couplings)
    finders = {FFN: finder.ffn, HIDDEN: finder.hidden, HEADS: finder.heads}
    missing: dict[str, str] = {}
    for kind, find in finders.items():
        if kind not in {*wanted, *optional}:
            continue
        try:
            find()
        except InputError as error:
            if kind in wanted:
                raise
            fault = error.faults[0]
            missing[kind] = str(fault)
            if isinstance(fault, Fault):
                missing[kind] = f"expected {fault.expected}, got {fault.got}"
    axes = {name: tuple(along) for name, along in finder.axes.items()}
    return Dimensions(finder.widths, axes, finder.follow, missing)


class _Finder:
    """What has been found so far in the model of one block."""

    def __init__(self, trial: Trial, couplings: Couplings) -> None:
        self.trial, self.couplings = trial, couplings
        self.widths: dict[str, Dimension] = {}
        self.axes: dict[str, list[Axis]] = {}
        self.follow = False

    def ffn(self) -> None:
        """Add the neurons."""
        coupling = _only(self.couplings.ffn, FFN, "one linear layer in each block that reads neurons")
        keys = find_ffn_keys(self.trial, coupling)
        if keys is None:
            raise _no_keys(self.trial, f"a key for {coupling.units} neurons")
        self._add(FFN, coupling, keys)

    def heads(self) -> None:
        """Add the groups of heads, unless they are there since they follow the hidden channels.

        Raises:
            PatternError: they follow the hidden channels, which are not cut.
        """
        if self.follow:
            return
        coupling, keys = self._attention(HEADS), self.head_keys
        if keys is None and coupling.units == 1:
            expected, got = "heads that can go one by one", "one group: they share a norm, or keys and values"
            raise PatternError(Fault(HEADS, expected, got, OTHERWISE))
        if keys is None:
            expected = "heads that something other than the hidden size counts"
            got = "a model whose heads together are always as wide as the hidden size, or no key for them"
            cure = "Set hidden instead: the heads follow it."
            raise PatternError(Fault(HEADS, expected, got, cure))
        self._add(HEADS, coupling, keys)

    @cached_property
    def head_keys(self) -> Keys | None:
        """What sets the heads alone, if anything does; there is one reader of them."""
        return find_head_keys(self.trial, self.couplings.heads[0])

    def hidden(self) -> None:
        """Add the hidden channels, and the heads if these follow."""
        heads = self._attention(HIDDEN)
        others = self.couplings.ffn
        pins: Changes = {}
        for coupling in others[:1] if len(others) == 1 else ():
            if ffn_keys := find_ffn_keys(self.trial, coupling):
                pins |= ffn_keys.changes(coupling.units)
        head_keys = self.head_keys
        pins |= head_keys.changes(heads.units) if head_keys else {}
        trial = self.trial.with_changes(pins)
        width = _width(trial.anatomy, heads)
        found = find_hidden_keys(trial, width, heads, others, follow=head_keys is None)
        if found is None:
            raise _no_keys(self.trial, f"keys for the hidden size {width} alone")
        keys, followers, axes = found
        if followers is not None:
            self.follow = True
            self._add(HEADS, heads, followers)
        pinned = {k: v for k, v in pins.items() if k not in dict(keys.scaled)}
        self._add_hidden(width, Keys(keys.scaled, tuple(pinned.items())), axes)

    def _attention(self, kind: str) -> Coupling:
        return _only(self.couplings.heads, kind, "one linear layer in each block that reads attention heads")

    def _add(self, kind: str, coupling: Coupling, keys: Keys) -> None:
        anatomy, block = self.trial.anatomy, self.trial.anatomy.blocks[0]
        owners = {f"{block}.{name}": owner for name, owner in coupling.makers.items()}
        owners[f"{block}.{coupling.reader}"] = coupling.owner_N
        for name, axis in coupled_axes(anatomy, coupling).items():
            owner = owners[name.rpartition(".")[0]]
            self.axes.setdefault(name.removeprefix(block), []).append(Axis(kind, axis, owner))
        parts = max(value for _, value in keys.scaled) if kind == HEADS else 1
        self.widths[kind] = Dimension(
            kind, coupling.units, coupling.size, parts, keys, (f".{coupling.reader}",)
        )

    def _add_hidden(self, width: int, keys: Keys, axes: Mapping[str, tuple[int, ...]]) -> None:
        anatomy, block = self.trial.anatomy, self.trial.anatomy.blocks[0]
        readers = []
        for name, along in axes.items():
            inside = name.removeprefix(block)
            owner = torch.arange(width)
            self.axes.setdefault(inside, []).extend(Axis(HIDDEN, axis, owner) for axis in along)
            linear = anatomy.linears.get(name.removesuffix(".weight"))
            if linear and linear.block and (0 if linear.transposed else 1) in along:
                readers.append(inside.removesuffix(".weight"))
        self.widths[HIDDEN] = Dimension(HIDDEN, width, 1, 1, keys, tuple(readers))


def pieces(anatomy: Anatomy, dimensions: Dimensions | None) -> Iterator[tuple[str, tuple[Axis, ...]]]:
    """Every parameter that is stored, and its axes; of tied ones the first."""
    again = {name for group in anatomy.tied for name in group[1:]}
    for name in anatomy.parameter_shapes:
        if name not in again:
            yield name, dimensions.axes_of(name, anatomy) if dimensions else ()


def _width(anatomy: Anatomy, heads: Coupling) -> int:
    """Of what attention writes: the hidden size."""
    return anatomy.linears[f"{anatomy.blocks[0]}.{heads.reader}"].out_features


def _only(found: tuple[Coupling, ...], kind: str, expected: str) -> Coupling:
    if len(found) == 1:
        return found[0]
    got = f"{len(found)} such layers" if found else f"no layer that reads {UNITS[kind]}"
    raise PatternError(Fault(kind, expected, got, OTHERWISE))


def _no_keys(trial: Trial, expected: str) -> ModelError:
    return ModelError(Fault(f"{trial.directory}: config.json", expected, "none", OTHERWISE))
