"""Taylor: a unit or a block is worth what the loss would change by without it, to first order.

Paper: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
https://arxiv.org/abs/1906.10771; element by element, then summed over all that belongs to a unit: Ma et al.,
"LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
https://arxiv.org/abs/2305.11627.

Shapes: L = blocks, U = units of a width, B = documents, T = tokens, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresskit.calibration.relay import HIDDEN
from compresskit.calibration.rows import Batches, Documents, Row
from compresskit.errors import DataError, Fault
from compresskit.modeling import load_model
from compresskit.modeling.skeleton import resolve_dtype
from compresskit.progress import Progress
from compresskit.sparse.structured.base import Scores, Subject
from compresskit.sparse.structured.tally import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class TaylorImportance:
    """The sum of ``|w g|`` over a unit's parameters, g the gradient of the mean next-token loss.

    Of a block it is the mean over tokens of ``|d g|``, d what the block adds to the hidden state and g the
    gradient there: its parameters matter to each other more than to the loss, and would tell little. The
    model and its gradients are whole in memory, in the dtype computed in.
    """

    reads_data: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = True

    def measure(self, subject: Subject) -> Scores:
        """Run the rows through the whole model, forward and backward.

        Args:
            subject: with rows; its model predicts the next token.

        Returns:
            Scores of blocks and units.

        Raises:
            DataError: no row has two tokens in a document.
        """
        source = subject.model
        dtype = resolve_dtype(subject.dtype)
        model = load_model(source, dtype=dtype or "auto", device=subject.device)
        blocks = _Blocks(model, source.anatomy.blocks)
        tokens = _accumulate(model, Batches(Documents(subject.rows)), blocks)
        tally = Tally(source.anatomy, subject.dimensions)
        stored = dict(model.named_parameters(remove_duplicate=False))
        for name in source.names() if subject.dimensions else ():
            parameter = stored.get(name)
            if parameter is not None and parameter.grad is not None:
                worth = (parameter.detach().float() * parameter.grad.float()).abs_() / tokens
                parameter.grad = None
                tally.add_parameter(name, worth)
        return Scores(blocks_L=blocks.sums_L / tokens, units=tally.units, num_tokens=tokens)


class _Blocks:
    """What blocks add to hidden states, and sums of its products with gradients."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.sums_L = torch.zeros(len(names), dtype=torch.float64)
        self._added: dict[int, tuple[Tensor, Tensor]] = {}
        for index, name in enumerate(names):
            model.get_submodule(name).register_forward_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            before_BTD = args[0] if args else kwargs[HIDDEN]
            after_BTD = output if isinstance(output, Tensor) else output[0]
            after_BTD.retain_grad()
            self._added[index] = (after_BTD, (after_BTD - before_BTD).detach())

        return see

    def take(self) -> None:
        """Add what the last backward pass left, and forget it."""
        for index, (after_BTD, added_BTD) in self._added.items():
            if after_BTD.grad is not None:
                product_BT = (after_BTD.grad.double() * added_BTD.double()).sum(-1)
                self.sums_L[index] += product_BT.abs().sum().cpu()
        self._added.clear()


def _accumulate(model: Any, batches: Iterable[Row], blocks: _Blocks) -> int:
    """Leave the gradient of the summed loss in ``model``; returns how many tokens were predicted."""
    rows, tokens = list(batches), 0
    with Progress("measuring importance", len(rows), unit="batches") as progress:
        for row in rows:
            row = {key: value.to(model.device) for key, value in row.items()}
            labels_BT, mask = row["input_ids"][:, 1:], row.get("attention_mask")
            if mask is not None:
                labels_BT = labels_BT.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
            count = int((labels_BT != -100).sum())
            if count:
                logits_BTV: Tensor = model(**row, use_cache=False).logits[:, :-1].float()
                nn.functional.cross_entropy(
                    logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="sum"
                ).backward()  # type: ignore[no-untyped-call]
                tokens += count
            blocks.take()
            progress.advance()
    if not tokens:
        cure = "Give more calibration data."
        raise DataError(Fault("calibration rows", "tokens that follow others", "none", cure))
    return tokens
