"""The ops as the rest of the package calls them: registered with torch, differentiable, chosen by the table.

The gradient of a fused loss is computed together with its value and only scaled in the backward pass; that
costs the memory of one head gradient and saves computing all logits a second time.

Shapes: N = tokens, D = student's hidden width, V or W = its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compresskit.kernels.dispatch import implementation
from compresskit.kernels.reference.linear_divergence import Result, Target, Term
from compresskit.kernels.reference.projection import accumulator

LINEAR_CROSS_ENTROPY = "compresskit::linear_cross_entropy"


class Sums(NamedTuple):
    """Of :func:`linear_divergence`; the first four of ``reference.linear_divergence.Result``."""

    total: Tensor
    terms: Tensor
    cross_entropy: Tensor
    agreed: Tensor


def linear_divergence(
    hidden_ND: Tensor,
    head_WD: Tensor,
    target: Target,
    terms: Sequence[Term],
    *,
    bias_W: Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    labels_N: Tensor | None = None,
    cross_entropy_weight: float = 0.0,
    chunk: int = 0,
) -> Sums:
    """Weighted sum over tokens of divergences from a teacher, in nats; differentiable for the student.

    Args:
        hidden_ND: (N, D), the student's.
        head_WD: (W, D).
        target: the teacher's distributions, over the first of the W ids.
        terms: which divergences, and how much each counts.
        bias_W: (W,) or None.
        softcap: bound of the student's logits; 0 for none.
        temperature: divides the logits of both; the sum is not multiplied by its square.
        labels_N: int64 (N,), each in [0, W), where the next-token loss is part of the sum.
        cross_entropy_weight: of that loss.
        chunk: tokens whose logits are alive at once; 0 chooses.

    Returns:
        Scalars in fp32 (fp64 for fp64 inputs); only ``total`` has a gradient.

    Raises:
        ValueError: the teacher has more ids than the student, or a cross entropy has no labels.
    """
    if target.vocabulary > head_WD.shape[0]:
        raise ValueError(
            f"vocabularies differ: {head_WD.shape[0]} student, {target.vocabulary} teacher; cut the teacher's"
        )
    if cross_entropy_weight and labels_N is None:
        raise ValueError("a cross entropy needs labels")
    arguments = (softcap, target, terms, temperature, labels_N, cross_entropy_weight, chunk)
    wanted = _wants_gradients(hidden_ND, head_WD, bias_W)
    return Sums(*_LinearDivergence.apply(hidden_ND, head_WD, bias_W, arguments, wanted))  # type: ignore[no-untyped-call]


def linear_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float = 0.0,
    chunk: int = 0,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ head.T)[label], in nats; labels below 0 do not count.

    Args:
        hidden_ND: (N, D).
        head_VD: (V, D).
        labels_N: int64 (N,).
        bias_V: (V,) or None.
        softcap: bound of the logits; 0 for none.
        chunk: tokens whose logits are alive at once; 0 chooses.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).
    """
    keep_N = labels_N >= 0
    hidden_ND, labels_N = hidden_ND[keep_N], labels_N[keep_N]
    wanted = _wants_gradients(hidden_ND, head_VD, bias_V)
    out: tuple[Tensor, ...] = _linear_cross_entropy(
        hidden_ND, head_VD, bias_V, labels_N, float(softcap), chunk, wanted
    )
    return out[0]


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _LinearDivergence(torch.autograd.Function):
    """No custom op of torch's: those take no functions, and divergences are functions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        arguments: tuple[Any, ...],
        with_gradients: bool,
    ) -> tuple[Tensor, ...]:
        run = implementation("linear_divergence", hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):  # each side computes in its own type
            result: Result = run(hidden, head, bias, *arguments, with_gradients)
        ctx.save_for_backward(result.hidden_ND, result.head_WD, result.bias_W)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, head, bias)]
        ctx.num_inputs = 5
        plain = result[1:4]
        ctx.mark_non_differentiable(*plain)
        return result[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _scale(ctx, *grads)


@torch.library.custom_op(LINEAR_CROSS_ENTROPY, mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    chunk: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation("linear_cross_entropy", hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):  # it would make products in fp32 narrow again
        result: tuple[Tensor, Tensor, Tensor, Tensor] = run(
            hidden, head, bias, labels, softcap, chunk, with_gradients
        )
    return result


def _fake(hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result, for tracing; the last argument says whether gradients are wanted."""
    rows, dtype = int(rest[-1]), accumulator(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty((hidden.shape[0] * rows, hidden.shape[1]), dtype=dtype),
        hidden.new_empty((head.shape[0] * rows, head.shape[1]), dtype=dtype),
        hidden.new_empty((head.shape[0] * rows,), dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.num_inputs = len(inputs)


@once_differentiable
def _scale(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients found in the forward pass, times that of the sum, in the dtype of each input."""
    grads = [
        None if dtype is None else (saved * grad_total).to(dtype)
        for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*grads, *(None for _ in range(ctx.num_inputs - 3)))


_linear_cross_entropy.register_fake(_fake)
_linear_cross_entropy.register_autograd(_scale, setup_context=_save)
