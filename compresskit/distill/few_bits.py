"""A teacher whose blocks multiply with weights in 8 or 4 bits, and how far it is from the full one.

Shapes: N = supervised tokens, B = rows, T = tokens of a row, E = hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.distill.divergences import projected
from compresskit.distill.forward_kl import ForwardKL
from compresskit.distill.teacher import Replica
from compresskit.kernels.ops import linear_divergence
from compresskit.kernels.reference.linear_divergence import Term
from compresskit.modeling import ModelSource
from compresskit.modeling.streaming import StreamedModel, return_memory
from compresskit.training.adapters.bits import freeze
from compresskit.training.adapters.frozen import frozen_model
from compresskit.training.objective import head_of, predictions, supervised_tokens
from compresskit.training.order import Rows, stack

SAMPLED_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class FewBits(Replica):
    """A replica whose linear layers were rounded as they were read, one at a time.

    Attributes:
        base: ``nf4`` or ``int8``.
        layers: names of the layers that are rounded; all others are as stored.
    """

    base: str
    layers: Sequence[str]

    @cached_property
    def _source(self) -> ModelSource:
        return ModelSource(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _model(self) -> nn.Module:
        # bitsandbytes has no products in float64, and returns whatever lay in memory.
        dtype = min(self._source.compute_dtype, torch.float32, key=lambda one: one.itemsize)

        def replace(name: str, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
            return_memory()  # what the layer before passed through on its way
            return freeze(weight_OI, bias_O, self.base, dtype=dtype)

        rounded = set(self.layers)
        model = frozen_model(self._source, frozenset(rounded), replace)
        for name, parameter in model.named_parameters():
            layer, _, leaf = name.rpartition(".")
            if leaf != "weight" or layer not in rounded:
                parameter.data = parameter.data.to(dtype)
        return model

    def told(self, rows: Rows, device: torch.device) -> tuple[str, ...]:
        """See ``Approximate.told``: the mean divergence from the full teacher on a few rows."""
        batch = {name: t.to(device) for name, t in stack([rows[i] for i in sample(len(rows))]).items()}
        (count, tokens), bits = batch["input_ids"].shape, 4 if self.base == "nf4" else 8
        if not supervised_tokens(batch["labels"]):
            return (
                f"How far the teacher in {bits} bits is from the full one was not measured: none of the "
                f"{count} rows that were looked at supervises a token.",
            )
        nats = self.divergence(batch["input_ids"], batch["position_ids"], batch["labels"])
        return (
            f"The teacher in {bits} bits is {nats:.2g} nats per token from the full one (KL divergence, on "
            f"{count} rows of {tokens} tokens of the training data).",
        )

    def divergence(self, ids: Tensor, positions: Tensor, labels_BT: Tensor) -> float:
        """Mean KL divergence of this teacher from the full one, nats per supervised token.

        Of the full one a block at a time is in memory.

        Args:
            ids: int64 (B, T).
            positions: of the tokens in their documents.
            labels_BT: not shifted; -100 does not count.
        """
        full_NE, _ = predictions(streamed_states(self._source, ids, positions), labels_BT)
        here_NE, _ = predictions(self.hidden(ids, positions), labels_BT)
        head = head_of(self._model).cut(self.vocabulary)  # both have this one
        full, terms = projected(full_NE, head), [Term(ForwardKL())]
        with torch.no_grad():
            sums = linear_divergence(
                here_NE, head.weight_VD, full, terms, bias_W=head.bias_V, softcap=head.softcap
            )
        return float(sums.terms[0]) / max(len(full_NE), 1)


def sample(rows: int) -> list[int]:
    """A few of so many rows, spread evenly."""
    count = min(rows, SAMPLED_ROWS)
    return [index * rows // count for index in range(count)]


def streamed_states(source: ModelSource, ids: Tensor, positions: Tensor) -> Tensor:
    """Hidden states (B, T, E) of the model of ``source``, with one of its blocks in memory."""
    with (
        StreamedModel(source, None, device=str(ids.device)) as streamed,
        ExitStack() as hooks,
        torch.no_grad(),
    ):
        resident = ExitStack()
        for index, name in enumerate(streamed.blocks):

            def enter(module: nn.Module, _: Any, index: int = index) -> None:
                resident.enter_context(streamed.block(index))

            def leave(module: nn.Module, _: Any, output: Any) -> None:
                resident.close()

            block = streamed.module.get_submodule(name)
            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
        for table in streamed.tables:
            if table != source.anatomy.head:
                hooks.enter_context(streamed.table(table))
        base: Any = streamed.module.base_model
        states: Tensor = base(input_ids=ids, position_ids=positions, use_cache=False)[0]
    return states
