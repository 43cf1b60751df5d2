"""What a student learns of whole sentences from its teacher: a weighted sum of losses.

On embeddings, which are pooled from the states of the last block, or on the logits of classes. Where the
widths of embeddings differ, a linear map to the teacher's is trained along with the student and thrown away
in the end.

Shapes: S = sentences, T = tokens of the longest, D = student's hidden width, E = teacher's, C = classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compresskit.distill import SENTENCE_LOSSES
from compresskit.distill.divergences import AGREEMENT, CROSS_ENTROPY, numbered
from compresskit.distill.sentence_base import SentenceLoss, pooled
from compresskit.training.objective import IGNORED, LOSS, Classified, Embedded, Signal
from compresskit.training.sentences import LOGITS, Sentences


@dataclass(frozen=True, kw_only=True)
class SentenceLosses:
    """A ``SentenceObjective``.

    Attributes:
        losses: names of ``compresskit.distill.SENTENCE_LOSSES``, each with its own fields; all of them look
            at embeddings, or all at logits.
        temperature: divides both models' logits; their losses are multiplied by its square.
        cross_entropy_weight: share of the ordinary loss on classes that rows have, in [0, 1]; of logits only.
        widths: of the student's and the teacher's embeddings, where one has to be projected; else None.
    """

    needs_teacher: ClassVar[bool] = True

    losses: Sequence[tuple[str, Mapping[str, Any]]]
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    widths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        # A job's options have been through JSON.
        object.__setattr__(self, "losses", tuple((name, dict(options)) for name, options in self.losses))
        object.__setattr__(self, "widths", self.widths and tuple(self.widths))

    @property
    def reads(self) -> str:
        """See ``SentenceObjective.reads``."""
        return self._made[0].reads

    @property
    def needs_labels(self) -> bool:
        """See ``SentenceObjective.needs_labels``."""
        return self.cross_entropy_weight > 0

    def sentence_projection(self) -> nn.Module | None:
        """See ``SentenceObjective.sentence_projection``; the same numbers whenever it is made."""
        if self.widths is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Linear(self.widths[0], self.widths[1], bias=False)

    def sentence_sums(
        self,
        made: Tensor,
        sentences: Sentences,
        signal: Signal | None,
        project: Callable[[Tensor], Tensor],
    ) -> Mapping[str, Tensor]:
        """Sums over the sentences of a batch.

        Args:
            made: states (S, T, D) or logits (S, C) of the student.
            sentences: the batch.
            signal: what the teacher says.
            project: embeddings (S, D) to the teacher's width.

        Returns:
            ``loss`` and, detached, each loss by its name (temperature squared included, its weight not); of
            logits also ``cross_entropy`` (where mixed, over the sentences that have a class) and
            ``agreement``: sentences whose likeliest class is the teacher's.

        Raises:
            ValueError: there is no signal.
        """
        if signal is None:
            raise ValueError("a loss on sentences needs a teacher's signal")
        if self.reads == LOGITS:
            return self._of_classes(made, sentences, signal)
        assert isinstance(signal.says, Embedded)
        theirs = signal.says.states_STE
        parts = {}
        for name, loss in zip(self._names, self._made, strict=True):
            pooling = getattr(loss, "pooling")  # noqa: B009 - of every loss on embeddings
            mine_SE = pooled(_wide(made), sentences.mask_ST, pooling)
            if loss.one_width:
                mine_SE = _wide(project(mine_SE))
            parts[name] = loss(mine_SE, pooled(_wide(theirs), sentences.mask_ST, pooling)).sum()
        return self._sums(parts, 1.0, {})

    def _of_classes(self, logits_SC: Tensor, sentences: Sentences, signal: Signal) -> Mapping[str, Tensor]:
        assert isinstance(signal.says, Classified)
        mine_SC, theirs_SC = _wide(logits_SC), _wide(signal.says.logits_SC)
        scale, share = self.temperature**2, self.cross_entropy_weight
        soft = mine_SC / self.temperature, theirs_SC / self.temperature
        made = zip(self._names, self._made, strict=True)
        parts = {name: scale * loss(*soft).sum() for name, loss in made}
        more = {AGREEMENT: (mine_SC.argmax(-1) == theirs_SC.argmax(-1)).sum()}
        if share and sentences.labels_S is not None:
            more[CROSS_ENTROPY] = cross_entropy(
                mine_SC, sentences.labels_S, ignore_index=IGNORED, reduction="sum"
            )
        return self._sums(parts, 1 - share, more)

    def _sums(
        self, parts: Mapping[str, Tensor], share: float, more: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The loss, and all that it is made of, detached."""
        total = torch.stack(
            [loss.weight * part for loss, part in zip(self._made, parts.values(), strict=True)]
        ).sum()
        total = share * total
        if CROSS_ENTROPY in more:
            total = total + self.cross_entropy_weight * more[CROSS_ENTROPY]
        return {LOSS: total, **{name: part.detach() for name, part in {**parts, **more}.items()}}

    @cached_property
    def _made(self) -> tuple[SentenceLoss, ...]:
        return tuple(SENTENCE_LOSSES[name](**options) for name, options in self.losses)

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """Of the parts; a loss that is there twice is numbered."""
        return numbered([name for name, _ in self.losses])


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
