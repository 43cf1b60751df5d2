"""What a training run came to. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """What a training run came to, as plain data; nearly all of it the same whenever the run is repeated.

    Attributes:
        steps: optimiser steps of the whole run.
        first_loss: of the first step, nats per supervised token.
        final_loss: mean over the last 10 steps.
        final_parts: of what the objective named of its loss, such as ``forward_kl`` and
            ``squarehead``, the same mean.
        validation_loss: of the weights that were given; None where there was nothing to evaluate on.
        skipped_steps: that the fp16 loss scaler left out.
        engine: that ran: ``single``, ``ddp``, ``fsdp`` or ``deepspeed ZeRO-<stage>``, and how ranks exchanged
            weights if they stepped alone; or ``pipeline <stages> x <schedule>``.
        processes: that took part.
        parameter_bytes: that this rank kept between steps.
        kernels: op -> implementation.
        resumed_from: step this start continued from; 0 for a fresh one. Not part of a manifest.
        seconds: that the steps since then took. Not part of a manifest.
        warnings: full sentences.
        validation_loss_before: of an evaluation before the first step; None where none was asked for.
        given_step: whose weights were given: the last one, or with ``keep_best`` the best evaluated.
        teacher: what its provider told of its preparations.
        learning_rate: peak, scaled with the batch where that was asked for; of the batch at the start.
        batch_sizes: first step -> rows of a step from there on, where the batch may grow.
        noise_scale_rows: of gradients at the end, if measured; None also where it is too large to tell.
        shares: rows of a step for each rank at the end, where speed was measured. Not part of a manifest.
        micro_batch_size: rows of a pass at the end, which may be fewer than were asked for. Not part of a
            manifest.
    """

    steps: int
    first_loss: float
    final_loss: float
    validation_loss: float | None
    skipped_steps: int
    engine: str
    processes: int
    parameter_bytes: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    resumed_from: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    final_parts: Mapping[str, float] = field(default_factory=dict)
    validation_loss_before: float | None = None
    given_step: int = 0
    teacher: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    batch_sizes: Mapping[str, int] = field(default_factory=dict)
    noise_scale_rows: float | None = None
    shares: tuple[int, ...] = ()
    micro_batch_size: int = 0

    def to_json(self) -> str:
        """As text that :func:`outcome_from_json` reads back to an equal outcome."""
        return json.dumps(asdict(self))


def outcome_from_json(text: str) -> TrainOutcome:
    """Inverse of :meth:`TrainOutcome.to_json`."""
    data = json.loads(text)
    return TrainOutcome(**data | {name: tuple(data[name]) for name in ("warnings", "shares")})
