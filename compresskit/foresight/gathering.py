"""Which weights are whole at once under ZeRO-3: what it fetches, fetches ahead and releases, gone through.

DeepSpeed fetches the weights of each module it comes to, and some of the next, up to ``prefetch`` numbers and
while fewer than ``live`` are there. When a module is done its weights go, unless they are needed again before
``reuse`` other numbers are, or were skipped as being there already when weights were fetched ahead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import prod

from compresskit.foresight.states import Engine, Shape
from compresskit.modeling.anatomy import Anatomy

Weights = tuple[tuple[str, int], ...]
"""Names and numbers."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A module that is come to.

    Attributes:
        phase: of the pass, as a peak is told.
        weights: of the module, those that are divided.
    """

    phase: str
    weights: Weights


def visits_of(
    anatomy: Anatomy, shapes: Mapping[str, Shape], again: Sequence[bool], whole: int
) -> tuple[Visit, ...]:
    """The modules of a pass, in order.

    Args:
        anatomy: of the model.
        shapes: of its parameters, tied ones once.
        again: of each block whether the backward pass computes it once more.
        whole: a parameter of so many numbers or fewer is never divided.
    """
    first = {name: group[0] for group in anatomy.tied for name in group}
    modules: dict[str, list[tuple[str, int]]] = {}
    for name in anatomy.parameter_shapes:
        kept = first.get(name, name)
        if (count := prod(shapes[kept])) > whole:
            modules.setdefault(name.rpartition(".")[0], []).append((kept, count))
    embedding = tuple(modules.pop(anatomy.embeddings or "", ()))
    blocks: dict[str, list[Weights]] = {block: [] for block in anatomy.blocks}
    tail: list[Weights] = []
    for module, weights in modules.items():
        inside = anatomy.block_of(module)
        (blocks[inside] if inside else tail).append(tuple(weights))
    found = [Visit("begin", embedding)]
    found += (Visit("forward", one) for block in blocks.values() for one in block)
    found += (Visit("loss", one) for one in tail)
    found += (Visit("loss back", one) for one in reversed(tail))
    for recomputes, block in zip(reversed(again), reversed(blocks.values()), strict=True):
        found += (Visit("backward", one) for one in (block if recomputes else ()))
        found += (Visit("backward", one) for one in reversed(block))
    return (*found, Visit("end", embedding))


@dataclass(slots=True)
class _Group:
    """Weights that are fetched together: a buffer, cut into copies when the first of them is needed."""

    weights: Weights
    waited: bool = False
    left: int = 0

    @property
    def numbers(self) -> int:
        return sum(count for _, count in self.weights)


@dataclass(slots=True)
class _Fetched:
    """What is there, and on its way."""

    here: dict[str, int] = field(default_factory=dict)
    coming: dict[str, _Group] = field(default_factory=dict)
    counted: int = 0
    held: int = 0

    def fetch(self, weights: Weights) -> None:
        missing = tuple((n, c) for n, c in weights if n not in self.here and n not in self.coming)
        if not missing:
            return
        group = _Group(missing, left=len(missing))
        self.counted += group.numbers
        self.held += group.numbers
        self.coming.update((name, group) for name, _ in missing)

    def wait(self, weights: Weights) -> Iterator[int]:
        """Numbers that are held meanwhile."""
        for name, _ in weights:
            group = self.coming.pop(name, None)
            if group is None:
                continue
            if not group.waited:
                group.waited = True
                self.here.update(group.weights)
                self.held += group.numbers * (len(group.weights) > 1)
                yield self.held
            group.left -= 1
            if not group.left:
                self.held -= group.numbers * (len(group.weights) > 1)

    def release(self, name: str) -> None:
        if name not in self.coming and name in self.here:
            count = self.here.pop(name)
            self.counted -= count
            self.held -= count


@lru_cache(maxsize=64)
def most_gathered(visits: tuple[Visit, ...], engine: Engine) -> Mapping[str, int]:
    """Phase -> numbers that are whole at once in it, at most, once DeepSpeed knows the order of modules."""
    uses: dict[str, list[int]] = {}
    for step, visit in enumerate(visits):
        for name, _ in visit.weights:
            uses.setdefault(name, []).append(step)
    passed = [0, *accumulate(sum(count for _, count in visit.weights) for visit in visits)]
    queue = deque((step, *weight) for step, visit in enumerate(visits) for weight in visit.weights)
    seen: dict[str, int] = {}
    there, most = _Fetched(), dict[str, int]()
    for step, visit in enumerate(visits):
        there.fetch(visit.weights)
        levels = [*there.wait(visit.weights)]
        for _ in range(sum(seen.get(name, -1) < step for name, _ in visit.weights)):
            at, name, _ = queue.popleft()
            seen[name] = at
        ahead: dict[str, int] = {}
        room = min(engine.live - there.counted, engine.prefetch)
        while queue and sum(ahead.values()) < room:
            at, name, count = queue.popleft()
            seen[name] = max(seen.get(name, -1), at)
            if name not in there.here and name not in there.coming:
                ahead[name] = count
        there.fetch(tuple(ahead.items()))
        most[visit.phase] = max(most.get(visit.phase, 0), there.held, *levels)
        for name, _ in visit.weights:
            later = uses[name][bisect_left(uses[name], step + 1) :]
            near = bool(later) and passed[later[0]] - passed[step + 1] < engine.reuse
            if not near and seen.get(name, -1) <= step + 1:
                there.release(name)
    return most
