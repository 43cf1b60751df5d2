"""How ranks that step alone agree on weights every so many steps: averages, or DiLoCo's outer steps.

Paper: Stich, "Local SGD Converges Fast and Communicates Little", 2018, arXiv 1805.09767; Douillard et al.,
"DiLoCo: Distributed Low-Communication Training of Language Models", 2023, arXiv 2311.08105; that an outer
step may arrive while ranks step on: Douillard et al., "Streaming DiLoCo with overlapping communication",
2025, arXiv 2501.18512.

A weight that is zero on every rank stays zero: its average, its difference and its outer momentum are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from compresskit.training.rules.asynchronous import BUCKET


class Exchange(Protocol):
    """Of the weights that ranks train alone; every rank calls each method at the same step.

    Attributes:
        done: exchanges whose result was taken over, also before a restart; a checkpoint has it beside
            :meth:`state`.
    """

    done: int

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        ...

    def stepped(self, step: int, *, last: bool) -> None:
        """After each step of the optimiser; after the ``last`` all ranks have the same weights."""
        ...

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """While it lasts the weights are those that all ranks agree on."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights; waits for what is under way."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        ...


class LocalSGD:
    """Every ``every`` steps each weight becomes its mean over the ranks.

    Args:
        weights: in training, alike on all ranks now; changed in place.
        every: steps of the optimiser.
    """

    def __init__(self, weights: Sequence[Tensor], *, every: int) -> None:
        self._weights, self._every = weights, every
        self.done = 0

    @property
    def words(self) -> str:
        """See :attr:`Exchange.words`."""
        return f"local_sgd every {self._every}"

    @torch.no_grad()
    def stepped(self, step: int, *, last: bool) -> None:
        """See :meth:`Exchange.stepped`."""
        if not last and step % self._every:
            return
        for weights in _buckets(self._weights):
            for weight, mean in zip(weights, Sent(weights).means(), strict=True):
                weight.copy_(mean)
        self.done += 1

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """See :meth:`Exchange.agreed`; only after an exchange, and before the next step, they agree."""
        yield

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class DiLoCo:
    """An outer optimiser, SGD with Nesterov momentum, steps by how far ranks have come on the average.

    With a ``delay`` ranks step on while what they have come is summed up; what they have come since is added
    to the outer weights once these arrive, so no step is lost, and none of an exchange is older than
    ``every + delay`` steps.

    Args:
        weights: in training, alike on all ranks now; changed in place.
        every: steps of the inner optimiser.
        delay: steps from sending to taking over; below ``every``.
        learning_rate: of the outer optimiser.
        momentum: of the outer optimiser.
    """

    def __init__(
        self, weights: Sequence[Tensor], *, every: int, delay: int, learning_rate: float, momentum: float
    ) -> None:
        self._weights, self._every, self._delay = weights, every, delay
        self._outer = [weight.detach().clone() for weight in weights]
        nesterov = momentum > 0
        self._optimizer = torch.optim.SGD(self._outer, lr=learning_rate, momentum=momentum, nesterov=nesterov)
        self._flight: _Flight | None = None
        self.done = 0

    @property
    def words(self) -> str:
        """See :attr:`Exchange.words`."""
        late = f", {self._delay} late" if self._delay else ""
        return f"diloco every {self._every}{late}"

    @torch.no_grad()
    def stepped(self, step: int, *, last: bool) -> None:
        """See :meth:`Exchange.stepped`."""
        if self._flight is not None and (last or step >= self._flight.step + self._delay):
            self._land(self._flight)
        if not last and step % self._every:
            return
        if self._delay and not last:
            weights = [weight.detach().clone() for weight in self._weights]
            self._flight = _Flight(step, weights, [self._send(*part) for part in self._parts()])
            return
        for outer, weights in self._parts():
            self._step(outer, self._send(outer, weights))
            for weight, agreed in zip(weights, outer, strict=True):
                weight.copy_(agreed)
        self.done += 1

    def _parts(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Outer weights and those in training, a bucket at a time."""
        return zip(_buckets(self._outer), _buckets(self._weights), strict=True)

    def _send(self, outer: Sequence[Tensor], weights: Sequence[Tensor]) -> Sent:
        """How far this rank has come."""
        return Sent([o - w for o, w in zip(outer, weights, strict=True)])

    def _step(self, outer: Sequence[Tensor], sent: Sent | Came) -> None:
        """The outer optimiser's, of the weights ``outer`` alone."""
        for weight, mean in zip(outer, sent.means(), strict=True):
            weight.grad = mean
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _land(self, flight: _Flight) -> None:
        """Take the outer step, and go on from there with what this rank has come since it was sent."""
        for sent, then, (outer, weights) in zip(
            flight.sent, _buckets(flight.weights), self._parts(), strict=True
        ):
            self._step(outer, sent)
            for weight, agreed, before in zip(weights, outer, then, strict=True):
                weight.copy_(agreed + (weight - before))
        self._flight = None
        self.done += 1

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """See :meth:`Exchange.agreed`: the outer weights; what is under way is not in them yet."""
        own = [weight.data for weight in self._weights]
        for weight, outer in zip(self._weights, self._outer, strict=True):
            weight.data = outer
        try:
            yield
        finally:
            for weight, data in zip(self._weights, own, strict=True):
                weight.data = data

    def state(self) -> dict[str, Any]:
        """See :meth:`Exchange.state`."""
        state: dict[str, Any] = {"outer": self._outer, "optimizer": self._optimizer.state_dict()}
        if self._flight is not None:
            flight = self._flight
            means = [mean for sent in flight.sent for mean in sent.means()]
            state["flight"] = (flight.step, flight.weights, means)
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        """See :meth:`Exchange.load`."""
        for mine, kept in zip(self._outer, state["outer"], strict=True):
            mine.copy_(kept)
        self._optimizer.load_state_dict(state["optimizer"])
        if "flight" in state:
            step, *parts = state["flight"]
            weights, means = ([t.to(self._outer[0].device) for t in part] for part in parts)
            self._flight = _Flight(step, weights, [Came(part) for part in _buckets(means)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in order, as many together as have at most ``BUCKET`` numbers; a larger one is alone."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(t.numel() for t in part) + tensor.numel() > BUCKET:
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part


class Sent:
    """Tensors of one type on their way to their mean over all ranks, a few large sums at a time.

    Every rank makes one; that returns at once.

    Args:
        tensors: of this rank.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [t.shape for t in tensors]
        self._flat = torch.cat([t.detach().flatten() for t in tensors])
        self._works = [dist.all_reduce(part, async_op=True) for part in torch.split(self._flat, BUCKET)]

    def means(self) -> list[Tensor]:
        """In the shapes they were sent in; waits for them."""
        if self._works:
            for work in self._works:
                work.wait()
            self._works.clear()
            self._flat /= dist.get_world_size()
        parts = torch.split(self._flat, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


@dataclass(frozen=True)
class Came:
    """What :class:`Sent` would give, of before a restart."""

    tensors: list[Tensor]

    def means(self) -> list[Tensor]:
        """They are known."""
        return self.tensors


@dataclass(frozen=True)
class _Flight:
    """An exchange under way.

    Attributes:
        step: after which it was sent.
        weights: of this rank, as they were then.
        sent: how far each rank had come, a bucket at a time.
    """

    step: int
    weights: list[Tensor]
    sent: Sequence[Sent | Came]
