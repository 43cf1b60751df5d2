"""Objectives on whole sentences, for models that read a text at once and have no next-token head.

A row is a sentence, or a pair of them in one text, padded to the longest of its batch. What is counted is
sentences, not tokens.

Shapes: S = sentences of a batch, T = tokens of the longest, D = student's hidden width, E = teacher's, C =
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compresskit.training.objective import LOSS, Signal

STATES, LOGITS = "states", "logits"
READ = ("input_ids", "attention_mask", "token_type_ids")
"""What a model may be given of a batch."""
SHOWN = 4
"""Names in a warning."""
SENTENCE_PROJECTION = "sentence_projection"
"""Where the projection is in the model while it trains: an engine takes it for part of it."""


@dataclass(frozen=True, slots=True)
class Sentences:
    """A batch as an objective sees it.

    Attributes:
        mask_ST: which tokens are no padding.
        labels_S: int64, -100 where a sentence has no class; None where no row has one.
    """

    mask_ST: Tensor
    labels_S: Tensor | None


@runtime_checkable
class SentenceObjective(Protocol):
    """An objective of this kind; a frozen dataclass of hyperparameters, run inside the wrapped forward."""

    needs_teacher: ClassVar[bool]

    @property
    def reads(self) -> str:
        """``states`` of the last block (S, T, D), or the ``logits`` of classes (S, C)."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether it looks at classes that rows have."""
        ...

    def sentence_projection(self) -> nn.Module | None:
        """From D to E, where embeddings are compared and the widths differ."""
        ...

    def sentence_sums(
        self,
        made: Tensor,
        sentences: Sentences,
        signal: Signal | None,
        project: Callable[[Tensor], Tensor],
    ) -> Mapping[str, Tensor]:
        """Sums over the sentences of a batch.

        Args:
            made: what :attr:`reads` says, of the model in training.
            sentences: the batch.
            signal: of the teacher, where one is needed.
            project: embeddings (S, D) to the teacher's width.

        Returns:
            ``loss``, the scalar to minimise, and any other sums worth a log, detached.
        """
        ...


def on_sentences(objective: object) -> SentenceObjective | None:
    """The sentence objective that ``objective`` is, or adds a feature loss to; None for any other."""
    inner = getattr(objective, "inner", objective)
    return inner if isinstance(inner, SentenceObjective) else None


def is_of_sentences(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch is one of sentences rather than of packed rows."""
    return "attention_mask" in inputs


def read_by(forward: Callable[..., Any], reads: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """The states (S, T, D) or logits (S, C) that ``forward`` makes of ``inputs``, padded."""
    out = forward(**{name: inputs[name] for name in READ if name in inputs})
    made: Tensor = out.logits if reads == LOGITS else out[0]
    return made


def unreached(model: nn.Module, fed: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the parameters of ``model`` that take a gradient, but none of the loss of a batch reaches.

    An encoder's pooler has no part in a mean over tokens; DDP would wait for its gradients in vain.

    Args:
        model: whose forward is the objective's sums; its mode is left as it was.
        fed: what that forward takes.
    """
    trains = model.training
    model.eval()
    reached = _leaves(model(**fed)[LOSS])
    model.train(trains)
    return tuple(n for n, p in model.named_parameters() if p.requires_grad and id(p) not in reached)


@contextmanager
def without_gradient(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While this lasts, the parameters called so take no gradient."""
    _require_gradient(model, names, False)
    try:
        yield
    finally:
        _require_gradient(model, names, True)  # by name: an engine may have put others in their place


def idle_warnings(names: tuple[str, ...]) -> tuple[str, ...]:
    """What to tell of parameters called so, which the loss does not reach."""
    if not names:
        return ()
    more = "" if len(names) <= SHOWN else f" and {len(names) - SHOWN} more"
    return (f"The loss does not reach {', '.join(names[:SHOWN])}{more}: they stay as they were.",)


def _require_gradient(model: nn.Module, names: Collection[str], value: bool) -> None:
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(value)


def _leaves(loss: Tensor) -> set[int]:
    """Of all leaves of the graph of ``loss``, their ids."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor):
            found.add(id(leaf))
        todo += [after for after, _ in node.next_functions]
    return found
