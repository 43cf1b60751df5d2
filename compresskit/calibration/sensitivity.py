"""What changing one layer alone costs the model: how far from what it said it then is.

The Kullback-Leibler divergence, in nats per token, is the loss increase on text that the model predicts as
well as it can be predicted.

Shapes: T = tokens, V = vocabulary, O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

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


def measure_costs(
    model: nn.Module,
    anatomy: Anatomy,
    candidates: Mapping[str, Sequence[C]],
    rows: Sequence[Row],
    change: Callable[[str, Tensor, C], Tensor],
    *,
    unit: str,
) -> dict[str, dict[C, float]]:
    """What each candidate costs where only one layer is changed, in nats per token.

    Args:
        model: whole, in evaluation mode; its weights are as before when this returns.
        anatomy: of the model.
        candidates: layer -> what it could be changed to.
        rows: calibration rows; as many are read as :data:`MAX_TOKENS` and :data:`LOG_PROBABILITIES` allow.
        change: ``change(layer, weight_OI, candidate)`` returns the layer's weight (O, I) under a candidate.
        unit: what a candidate is called in the progress line.

    Raises:
        ModelError: the model has no logits.
    """
    probe = _Probe(model, anatomy.blocks, rows)
    costs: dict[str, dict[C, float]] = {layer: {} for layer in candidates}
    places = [*anatomy.blocks, None]
    with Progress("measuring sensitivity", sum(map(len, candidates.values())), unit=unit) as bar:
        for index, block in enumerate(places):
            for layer in (n for n in candidates if anatomy.linears[n].block == block):
                transposed = anatomy.linears[layer].transposed
                weight = model.get_parameter(f"{layer}.weight")
                former = weight.detach().clone()
                former_OI = former.t() if transposed else former
                for candidate in candidates[layer]:
                    new_OI = change(layer, former_OI, candidate)
                    with torch.no_grad():
                        weight.copy_(new_OI.t() if transposed else new_OI)
                    costs[layer][candidate] = probe.divergence(index if block is not None else 0)
                    bar.advance(note=layer)
                with torch.no_grad():
                    weight.copy_(former)
            if block is not None:
                probe.pass_block(index)
    return costs


class _Probe:
    """The original model's log-probabilities, and how far a changed one's are from them.

    Blocks before the one that changed are not run again: the last of them gives back what it gave before.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], rows: Sequence[Row]) -> None:
        self.model = model
        self.blocks = [model.get_submodule(name) for name in blocks]
        self.given: list[Any] = []
        self.documents: list[Row] = []
        self.expected: list[Tensor] = []
        tokens = 0
        for document in Documents(rows):
            logits_TV = self._logits(document, 0, None)
            tokens += len(logits_TV)
            if self.documents and (tokens > MAX_TOKENS or tokens * logits_TV.shape[1] > LOG_PROBABILITIES):
                break
            self.documents.append(document)
            self.expected.append(logits_TV.log_softmax(-1))

    def divergence(self, index: int) -> float:
        """Nats per token between the original model and the one at hand, whose blocks before ``index`` are
        as they were."""
        total, tokens = 0.0, 0
        start = index if self.given else 0
        for at, document in enumerate(self.documents):
            got_TV = self._logits(document, start, at).log_softmax(-1)
            want_TV = self.expected[at]
            total += float((want_TV.exp() * (want_TV - got_TV)).sum(dtype=torch.float64))
            tokens += len(got_TV)
        return total / tokens

    def pass_block(self, index: int) -> None:
        """Remember what block ``index`` gives; it is as it was."""
        given: list[Any] = []
        handle = self.blocks[index].register_forward_hook(lambda _m, _a, output: given.append(output))
        for at, document in enumerate(self.documents):
            self._logits(document, index, at)
        handle.remove()
        self.given = given

    @torch.no_grad()
    def _logits(self, document: Row, start: int, at: int | None) -> Tensor:
        device = next(self.model.parameters()).device
        inputs = {key: value.to(device) for key, value in document.items()}
        with self._standing_in(start, at):
            logits = getattr(self.model(**inputs), "logits", None)
        if logits is None:
            cls, cure = type(self.model).__name__, "Say what each layer gets yourself."
            raise ModelError(Fault("sensitivity", "a model with logits", cls, cure))
        return logits.float().reshape(-1, logits.shape[-1])  # type: ignore[no-any-return]

    def _standing_in(self, start: int, at: int | None) -> AbstractContextManager[None]:
        """Within, the blocks before ``start`` do no work; all return what the last of them gave before."""
        is_on = at is not None and bool(self.given)
        output = self.given[at] if at is not None and self.given else None
        blocks = self.blocks[:start] if is_on else []
        return computing((block, lambda *args, **kwargs: output) for block in blocks)
