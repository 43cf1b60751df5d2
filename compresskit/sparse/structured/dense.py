"""A dense model run block by block, to measure what its layers read. Nothing is changed, nothing written.

Shapes: L = blocks, B = documents of a batch, T = tokens, D = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresskit.calibration.activations import Activations
from compresskit.calibration.collect import Collector
from compresskit.calibration.relay import Relay
from compresskit.calibration.rows import Batches, Documents, Row
from compresskit.calibration.statistics import LayerStats
from compresskit.errors import DataError, Fault
from compresskit.modeling.streaming import StreamedModel, return_memory
from compresskit.progress import Progress
from compresskit.sparse.structured.base import Subject

Take = Callable[[Mapping[str, LayerStats]], None]
"""Called once for each block, with the statistics of its layers."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a walk saw besides.

    Attributes:
        influence_L: of each block 1 less the mean cosine of a token's hidden state before and after it.
        num_tokens: calibration tokens, padding not counted.
    """

    influence_L: Tensor
    num_tokens: int


def walk_dense(subject: Subject, needs: frozenset[str], take: Take) -> Seen:
    """Measure the layers of every block that read a width, on what the dense blocks before it make.

    Args:
        subject: with rows.
        needs: names of ``calibration.statistics.STATISTICS``.
        take: see :data:`Take`.

    Raises:
        DataError: there are no rows, or all is padding.
        ModelError: weights cannot be read, or the model's blocks cannot run one by one.
    """
    documents = Documents(subject.rows)
    if not documents.num_tokens:
        got = "padding only" if len(subject.rows) else "none"
        raise DataError(Fault("calibration rows", "tokens", got, "Give more calibration data."))
    batches, blocks = list(Batches(documents)), subject.model.anatomy.blocks
    with (
        StreamedModel(subject.model, None, device=subject.device, dtype=subject.dtype) as streamed,
        closing(Activations(subject.spill)) as hidden,
        Progress("measuring importance", len(blocks) * len(batches), unit="batches") as progress,
    ):
        relay = Relay(streamed)
        with _embeddings(streamed):
            for at, row in enumerate(batches):
                hidden[at] = relay.embed(row)
        sums_L = torch.zeros(len(blocks), dtype=torch.float64)
        for index, block in enumerate(blocks):
            with streamed.block(index):
                if index == 0:
                    _learn(streamed, relay, batches[0])
                    relay.compare(batches)
                layers = [subject.model.anatomy.linears[name] for name in _readers(subject, block)]
                with Collector(streamed.module, layers, needs, streamed.device) as collector:
                    for at, row in enumerate(batches):
                        collector.begin(row["input_ids"].numel(), row.get("attention_mask"))
                        before = hidden[at].to(streamed.device)
                        after = relay.through(index, row, before)
                        sums_L[index] += _turned(before, after, row)
                        hidden[at] = after
                        progress.advance(note=block)
                take(collector.finish([layer.name for layer in layers]))
            return_memory()
    return Seen(sums_L / documents.num_tokens, documents.num_tokens)


def _embeddings(streamed: StreamedModel) -> AbstractContextManager[object]:
    name = streamed.source.anatomy.embeddings
    return streamed.table(name) if name in streamed.tables else nullcontext()


def _learn(streamed: StreamedModel, relay: Relay, row: Row) -> None:
    """What the relay has to know of block 0, which is in memory, before others are."""
    first = {key: value[:1] for key, value in row.items()}
    relay.learn(first)
    with _embeddings(streamed):
        relay.require_independence(first)


def _readers(subject: Subject, block: str) -> list[str]:
    """Layers of ``block`` that read a width."""
    widths = subject.dimensions.widths.values() if subject.dimensions else ()
    inside = {reader for dimension in widths for reader in dimension.readers}
    return [name for name in subject.model.anatomy.linears if name.removeprefix(block) in inside]


def _turned(before_BTD: Tensor, after_BTD: Tensor, row: Row) -> float:
    """The sum over tokens of 1 less the cosine of both; padding does not count."""
    cosine_BT = nn.functional.cosine_similarity(before_BTD.double(), after_BTD.double(), dim=-1)
    mask = row.get("attention_mask")
    keep_BT = torch.ones_like(cosine_BT) if mask is None else (mask != 0).to(cosine_BT)
    return float(((1 - cosine_BT) * keep_BT).sum())
