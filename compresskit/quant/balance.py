"""Methods that scale: what a block's modules may hand each other, chosen by the method and folded in here.

Before a block's layers are quantised, each group of linear layers that read one tensor may have their input
columns multiplied by a factor each, and the channels of what makes that tensor divided by it: the block
computes what it did, and its weights or its inputs round better.

Shapes: O = out_features, I = in_features, C = channels of a producer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from compresskit.calibration.relay import Relay
from compresskit.calibration.statistics import STATISTICS, LayerStats
from compresskit.modeling.neighbours import PROBE_TOKENS, Group, find_groups, fold
from compresskit.modeling.streaming import StreamedModel
from compresskit.quant.base import Quantizer
from compresskit.quant.scheme import Scheme

UNSCALED = (
    "not scaled first: what it reads is read by others too, or comes through a function that is not linear"
)


@dataclass(frozen=True, slots=True)
class Reader:
    """One of the linear layers that read the same tensor, as it is before scaling.

    Attributes:
        weight_OI: its weight.
        scheme: it will be quantised to.
        stats: of its inputs.
        after_norm: whether a norm makes them; else another linear layer does.
    """

    weight_OI: Tensor
    scheme: Scheme
    stats: LayerStats
    after_norm: bool = True


@runtime_checkable
class Balancer(Protocol):
    """A quantizer that scales inputs first; its scale() is pure."""

    needs: ClassVar[frozenset[str]]

    def scale(self, readers: Sequence[Reader], channel_I: Tensor) -> Tensor:
        """Factors (I,), float32 and positive, for the columns of ``readers``; equal where channels are."""
        ...


def share(scale_I: Tensor, channel_I: Tensor) -> Tensor:
    """``scale_I`` (I,) with inputs from the same channel given their geometric mean.

    Args:
        scale_I: positive.
        channel_I: int64, the channel behind each input.
    """
    count_C = torch.bincount(channel_I)
    log_C = torch.zeros_like(count_C, dtype=scale_I.dtype).index_add_(0, channel_I, scale_I.log())
    return (log_C / count_C.clamp(min=1)).exp()[channel_I]


def balance(method: Quantizer, schemes: Mapping[str, Scheme]) -> Balance | None:
    """What prepares each block for ``method``; None for one that does not scale."""
    return Balance(method, schemes) if isinstance(method, Balancer) else None


class Balance:
    """What a walk calls to prepare a block: finds its groups, asks the method, folds the factors in.

    Args:
        method: chooses the factors.
        schemes: of each layer that will be quantised.

    Attributes:
        scaled: layers whose inputs were scaled, or could have been had it been of use.
    """

    def __init__(self, method: Balancer, schemes: Mapping[str, Scheme]) -> None:
        self._method, self._schemes = method, schemes
        self._relay: Relay | None = None
        self._row = {"input_ids": torch.arange(PROBE_TOKENS)[None]}
        self.scaled: list[str] = []

    @property
    def unscaled(self) -> tuple[str, ...]:
        """Layers that no factor could be handed to."""
        return tuple(name for name in self._schemes if name not in self.scaled)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence, where layers were quantised without scaling."""
        if not self.unscaled:
            return ()
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in self.unscaled}))
        return (
            f"{len(self.unscaled)} of {len(self._schemes)} layers ({kinds}) were quantised without "
            "being scaled: nothing before them can take the inverse scales and leave the model as it is.",
        )

    def __call__(
        self, index: int, streamed: StreamedModel, stats: Mapping[str, LayerStats]
    ) -> Mapping[str, LayerStats]:
        """Scale block ``index``, which is entered; the statistics of its layers after that."""
        if self._relay is None:
            self._relay = Relay(streamed)
            self._relay.learn(self._row)
        if not stats:
            return stats
        block = streamed.blocks[index]
        names = [name.removeprefix(f"{block}.") for name in stats]
        like = self._relay.embed(self._row)
        random = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
        call = self._relay.call(index, self._row, random.to(like))
        after = dict(stats)
        for group in find_groups(streamed.module.get_submodule(block), names, call):
            self._fold(streamed, f"{block}.", group, after)
        return after

    def _fold(self, streamed: StreamedModel, prefix: str, group: Group, stats: dict[str, LayerStats]) -> None:
        """Scale one group; replace its layers' statistics in ``stats``."""
        layers = [prefix + name for name in group.consumers]
        tied = {name.rpartition(".")[0] for names in streamed.source.anatomy.tied for name in names}
        if not tied.isdisjoint([prefix + group.producer, *layers]):
            return
        after_norm = group.offset is not None
        readers = [Reader(streamed.weight_OI(n), self._schemes[n], stats[n], after_norm) for n in layers]
        channel_I = group.channel_I.to(streamed.device)
        scale_I = self._method.scale(readers, channel_I)
        self.scaled += layers
        if bool((scale_I == 1).all()):
            return
        scale_C = torch.ones(group.num_channels, device=streamed.device)
        scale_C[channel_I] = scale_I
        scale_I = fold(
            group,
            scale_C,
            lambda name: streamed.parameter(prefix + name),
            lambda name, value: streamed.set_parameter(prefix + name, value),
        )
        done: dict[tuple[int, ...], LayerStats] = {}
        for name in layers:
            # Layers that read the same tensor share their statistics, which may be large.
            same = tuple(id(getattr(stats[name], field)) for field in STATISTICS.values())
            if same not in done:
                done[same] = stats[name].divided_by(scale_I)
            stats[name] = replace(done[same], layer=name)
