"""Run an objective inside a model's own forward, so that every engine's hooks see it.

Outside of the wrapped forward the output projection may be a shard (FSDP2) or empty (ZeRO-3). So the model's
forward is replaced by one that stops at the hidden states, and the head is still *called*: only what it
computes is replaced, for the length of the call. Engines gather its weight as for any other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresskit.modeling.forwards import computing
from compresskit.training.features import (
    Counted,
    Featured,
    Watched,
    looking_at,
    watched_in,
    with_feature_losses,
)
from compresskit.training.objective import (
    Head,
    Objective,
    Signal,
    TeacherProvider,
    head_module,
    softcap_of,
)
from compresskit.training.order import FED
from compresskit.training.sentences import (
    LOGITS,
    SENTENCE_PROJECTION,
    Sentences,
    on_sentences,
    read_by,
    unreached,
)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What is not a product of a block's layer is in bf16 where those are in fp8."""


@contextmanager
def redirected(model: nn.Module, objective: Objective, *, precision: str) -> Iterator[None]:
    """While this lasts, ``model(input_ids, position_ids, labels, signal)`` is the objective's sums.

    Args:
        model: a causal language model, not wrapped yet; with a sentence objective any other, whose inputs
            are then ``input_ids``, ``attention_mask``, ``labels``, ``signal`` and perhaps ``token_type_ids``.
        objective: what to compute.
        precision: ``fp32``, ``bf16`` or ``fp16``: the type matrix products run in; weights are not touched.
    """
    if on_sentences(objective) is not None:
        with computing([(model, _reading(model, objective, AUTOCAST.get(precision)))]):
            yield
        return
    head = head_module(model)
    softcap = softcap_of(model)
    featured = objective if isinstance(objective, Featured) else None
    # Found now: an engine may leave parameters empty, by whose number blocks are known.
    watched = watched_in(model, featured.looks) if featured else Watched()

    def forward(
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        signal: Signal | None = None,
    ) -> Mapping[str, Tensor]:
        def project(hidden: Tensor) -> Mapping[str, Tensor]:
            bias, weight = getattr(head, "bias", None), cast(Tensor, head.weight)
            operands = getattr(head, "operands", None)
            if callable(operands):  # a layer that multiplies something else than it holds
                hidden, weight = operands(hidden)
            return objective(_narrow(hidden, precision), Head(weight, bias, softcap), labels, signal)

        kind = input_ids.device.type
        with torch.autocast(kind, dtype=AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            base: nn.Module = model.base_model  # type: ignore[assignment]
            with looking_at(watched) as seen:
                hidden = base(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
            with computing([(head, project)]):
                sums: Mapping[str, Tensor] = head(hidden)
            if featured is not None and signal is not None:
                counted = Counted.of_text(labels, position_ids)
                sums = with_feature_losses(featured, sums, model, seen(), signal, counted)
        return sums

    with computing([(model, forward)]):
        yield


def idle_in(
    model: nn.Module,
    objective: Objective,
    batch: Mapping[str, Tensor],
    teacher: TeacherProvider | None,
    *,
    precision: str,
) -> tuple[str, ...]:
    """Names of the parameters of ``model`` that a sentence objective does not reach.

    Args:
        model: not wrapped yet.
        objective: with the projections it asks for in the model already.
        batch: any sentences.
        teacher: of the objective.
        precision: as of :func:`redirected`.
    """
    fed: dict[str, Any] = {name: batch[name] for name in FED if name in batch}
    if teacher is not None:
        fed["signal"] = teacher.signal(fed)
    with redirected(model, objective, precision=precision):
        return unreached(model, fed)


def _reading(model: nn.Module, objective: object, narrow: torch.dtype | None) -> Callable[..., Any]:
    """A forward that is the sums of a sentence objective; the model's own makes what it looks at."""
    inner = on_sentences(objective)
    assert inner is not None
    featured = objective if isinstance(objective, Featured) else None
    watched = watched_in(model, featured.looks) if featured else Watched()
    base = getattr(model, "base_model", model)
    whole = inner.reads == LOGITS or base is model
    read = model.forward if whole else base  # the model's own forward is about to be replaced

    def forward(
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        signal: Signal | None = None,
    ) -> Mapping[str, Tensor]:
        fed = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            fed["token_type_ids"] = token_type_ids
        with torch.autocast(input_ids.device.type, dtype=narrow, enabled=narrow is not None):
            with looking_at(watched) as seen:
                made = read_by(read, inner.reads, fed)
            project = getattr(model, SENTENCE_PROJECTION, nn.Identity())
            sums = inner.sentence_sums(made, Sentences(attention_mask, labels), signal, project)
            if featured is not None and signal is not None:
                counted = Counted.of_sentences(attention_mask)
                sums = with_feature_losses(featured, sums, model, seen(), signal, counted)
        return sums

    return forward


def _narrow(hidden: Tensor, precision: str) -> Tensor:
    """The fused losses are no autocast ops: give them the type autocast would."""
    return hidden.to(AUTOCAST[precision]) if precision in AUTOCAST else hidden
