"""What changing one layer alone costs the model: how far from what it said it then is.

The Kullback-Leibler divergence, in nats per token, is the loss increase on text that the model predicts as
well as it can be predicted.

Shapes: T = tokens, V = vocabulary, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from compresskit.calibration.rows import Documents, Row
from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import Anatomy
from compresskit.modeling.forwards import computing
from compresskit.progress import Progress

LOG_PROBABILITIES = 1 << 26
"""How many of the original model's are kept in memory, 4 bytes each."""
MAX_TOKENS = 4096

C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Change(Generic[C]):
    """What may be done to a layer; a candidate says how much of it.

    Attributes:
        kind: what it is, with all that its result depends on besides the model, the calibration rows, the
            layer and the candidate.
        unit: what a candidate is called in the progress line.
        text: ``text(layer, candidate)``: the change in full; one text is one change.
        weight: ``weight(layer, weight_OI, candidate)`` returns the layer's weight (O, I) under a candidate.
    """

    kind: str
    unit: str
    text: Callable[[str, C], str]
    weight: Callable[[str, Tensor, C], Tensor]


def measure_costs(
    model: nn.Module,
    anatomy: Anatomy,
    candidates: Mapping[str, Sequence[C]],
    rows: Sequence[Row],
    change: Change[C],
    measured: Callable[[Mapping[str, Mapping[C, float]]], None] = lambda costs: None,
) -> dict[str, dict[C, float]]:
    """What each candidate costs where only one layer is changed, in nats per token.

    A cost is the same whatever else is measured with it, and in whatever order.

    Args:
        model: whole, in evaluation mode; its weights are as before when this returns.
        anatomy: of the model.
        candidates: layer -> what it could be changed to.
        rows: calibration rows; as many are read as :data:`MAX_TOKENS` and :data:`LOG_PROBABILITIES` allow.
        change: what the candidates are of.
        measured: told of all costs so far after each block.

    Raises:
        ModelError: the model has no logits.
    """
    probe = _Probe(model, anatomy.blocks, rows)
    costs: dict[str, dict[C, float]] = {layer: {} for layer in candidates}
    total = sum(map(len, candidates.values()))
    with Progress("measuring sensitivity", total, unit=change.unit) as bar:
        for index, block in enumerate([*anatomy.blocks, None]):
            layers = [n for n, of in candidates.items() if of and anatomy.linears[n].block == block]
            if layers and block is not None:
                probe.pass_to(index)
            for layer in layers:
                transposed = anatomy.linears[layer].transposed
                weight = model.get_parameter(f"{layer}.weight")
                former = weight.detach().clone()
                former_OI = former.t() if transposed else former
                for candidate in candidates[layer]:
                    new_OI = change.weight(layer, former_OI, candidate)
                    with torch.no_grad():
                        weight.copy_(new_OI.t() if transposed else new_OI)
                    costs[layer][candidate] = probe.divergence(whole=block is None)
                    bar.advance(note=layer)
                with torch.no_grad():
                    weight.copy_(former)
            if layers:
                measured(costs)
    return costs


class _Probe:
    """The original model's log-probabilities, and how far a changed one's are from them.

    Blocks before the one that changed are not run again: the last of them gives back what it gave before.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], rows: Sequence[Row]) -> None:
        self.model = model
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.given: list[Any] = []
        self.start = 0
        self.documents: list[Row] = []
        self.expected: list[Tensor] = []
        tokens = 0
        for document in Documents(rows):
            logits_TV = self._logits(document, 0, 0)
            tokens += len(logits_TV)
            if self.documents and (tokens > MAX_TOKENS or tokens * logits_TV.shape[1] > LOG_PROBABILITIES):
                break
            self.documents.append(document)
            self.expected.append(logits_TV.log_softmax(-1))

    def divergence(self, *, whole: bool) -> float:
        """Nats per token between the original model and the one at hand.

        Args:
            whole: run all of it; else the blocks that were passed are as they were.
        """
        total, tokens = 0.0, 0
        for at, document in enumerate(self.documents):
            got_TV = self._logits(document, 0 if whole else self.start, at).log_softmax(-1)
            want_TV = self.expected[at]
            total += float((want_TV.exp() * (want_TV - got_TV)).sum(dtype=torch.float64))
            tokens += len(got_TV)
        return total / tokens

    def pass_to(self, index: int) -> None:
        """Remember what block ``index`` is given; the blocks before it are as they were."""
        if index == self.start:
            return
        given: list[Any] = []
        handle = self.blocks[index - 1].register_forward_hook(lambda _m, _a, output: given.append(output))
        for at, document in enumerate(self.documents):
            self._logits(document, self.start, at)
        handle.remove()
        self.given, self.start = given, index

    @torch.no_grad()
    def _logits(self, document: Row, start: int, at: int) -> Tensor:
        device = next(self.model.parameters()).device
        inputs = {key: value.to(device) for key, value in document.items()}
        with self._standing_in(start, at):
            logits = getattr(self.model(**inputs), "logits", None)
        if logits is None:
            cls, cure = type(self.model).__name__, "Say what each layer gets yourself."
            raise ModelError(Fault("sensitivity", "a model with logits", cls, cure))
        return logits.float().reshape(-1, logits.shape[-1])  # type: ignore[no-any-return]

    def _standing_in(self, start: int, at: int) -> AbstractContextManager[None]:
        """Within, the blocks before ``start`` do no work; all return what the last of them gave before."""
        return computing((block, lambda *args, **kwargs: self.given[at]) for block in self.blocks[:start])
