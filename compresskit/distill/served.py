"""A teacher that runs elsewhere, behind a server that tells its likeliest next tokens.

Shapes: B = rows, T = tokens of a row, K = listed ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import exp, log, log1p
from typing import Any, ClassVar

import torch
from torch import Tensor

from compresskit.distill.completions import Completions
from compresskit.kernels.reference.linear_divergence import LEAST_LOG
from compresskit.training.objective import IGNORED, Listing, Signal

REQUESTS = 16
"""Of one process at a time; the server makes batches of them."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """Asks for each document of each row of this process, and for nothing that is not learnt.

    A server knows no rows of several documents, so each is a prompt of its own.

    Attributes:
        server: fields of ``Completions``.
    """

    server: Mapping[str, Any]

    hidden = None
    is_remote: ClassVar[bool] = True

    @property
    def identity(self) -> str:
        """See ``Known``: the same model at another address is the same teacher."""
        told = {name: self.server[name] for name in ("model", "top_k", "vocabulary")}
        return f"{type(self).__name__} {told}"

    def load(self) -> None:
        """There is nothing to read."""

    @cached_property
    def _server(self) -> Completions:
        return Completions(**self.server)

    def signal(self, inputs: Mapping[str, Tensor]) -> Signal:
        """The K likeliest ids after each token that a label follows, and the rest.

        Args:
            inputs: ``input_ids``, ``position_ids``, which start again at 0 with each document, and
                ``labels``, each int64 (B, T).

        Raises:
            RunError: the server has stopped answering.
        """
        ids_BT, listed = inputs["input_ids"], self._server.top_k
        rows = ids_BT.tolist()
        spans = [
            (row, start, end)
            for row, (positions, labels) in enumerate(
                zip(inputs["position_ids"].tolist(), inputs["labels"].tolist(), strict=True)
            )
            for start, end in learnt_spans(positions, labels)
        ]
        # What nobody asks for stays uniform over the first ids; no label follows it.
        ids_BTK = torch.arange(listed).repeat(*ids_BT.shape, 1)
        logs_BTO = torch.full((*ids_BT.shape, listed + 1), -log(listed + 1))
        pool = ThreadPoolExecutor(REQUESTS)
        try:
            answers = pool.map(self._server.likeliest, [rows[row][a:b] for row, a, b in spans])
            for (row, start, end), (ids, logs) in zip(spans, answers, strict=True):
                ids_BTK[row, start : end - 1] = torch.tensor(ids)
                told = [[*place, rest_of(place)] for place in logs]
                logs_BTO[row, start : end - 1] = torch.tensor(told)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        device = ids_BT.device
        return Signal(Listing(ids_BTK.to(device), logs_BTO.to(device), self._server.vocabulary))


def learnt_spans(positions_T: Sequence[int], labels_T: Sequence[int]) -> list[tuple[int, int]]:
    """Where each document begins that has a label to predict, and the end of its last label."""
    starts = [t for t, position in enumerate(positions_T) if t == 0 or position == 0]
    spans = []
    for start, end in zip(starts, [*starts[1:], len(positions_T)], strict=True):
        learnt = [t for t in range(start + 1, end) if labels_T[t] != IGNORED]
        if learnt:
            spans.append((start, learnt[-1] + 1))
    return spans


def rest_of(logs: Sequence[float]) -> float:
    """The log-probability of all other ids."""
    known = sum(map(exp, logs))
    return max(log1p(-known), LEAST_LOG) if known < 1 else LEAST_LOG
