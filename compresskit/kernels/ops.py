"""The ops as the rest of the package calls them: registered with torch, differentiable, chosen by the table.

The gradient of a fused loss is computed together with its value and only scaled in the backward pass; that
costs the memory of one head gradient and saves computing all logits a second time.

Shapes: N = tokens, D = student's hidden width, E = teacher's, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresskit.kernels.dispatch import implementation
from compresskit.kernels.reference.projection import accumulator

LINEAR_KL = "compresskit::linear_kl"
LINEAR_CROSS_ENTROPY = "compresskit::linear_cross_entropy"


def linear_kl(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    *,
    keep_N: Tensor | None = None,
    student_bias_V: Tensor | None = None,
    teacher_bias_V: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float = 0.0,
    teacher_softcap: float = 0.0,
    chunk: int = 0,
) -> Tensor:
    """Sum over tokens of KL(teacher || student), in nats; differentiable in the student's tensors.

    Args:
        student_hidden_ND: (N, D).
        student_head_VD: (V, D).
        teacher_hidden_NE: (N, E).
        teacher_head_VE: (V, E).
        keep_N: bool (N,): tokens that count; None counts all.
        student_bias_V: (V,) or None.
        teacher_bias_V: (V,) or None.
        temperature: divides the logits of both.
        student_softcap: bound of the student's logits; 0 for none.
        teacher_softcap: bound of the teacher's logits; 0 for none.
        chunk: tokens whose logits are alive at once; 0 chooses.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: the two vocabularies differ; cut them first.
    """
    if student_head_VD.shape[0] != teacher_head_VE.shape[0]:
        raise ValueError(
            f"vocabularies differ: {student_head_VD.shape[0]} student, {teacher_head_VE.shape[0]} teacher"
        )
    if keep_N is not None:
        student_hidden_ND, teacher_hidden_NE = student_hidden_ND[keep_N], teacher_hidden_NE[keep_N]
    wanted = _wants_gradients(student_hidden_ND, student_head_VD, student_bias_V)
    out: tuple[Tensor, ...] = _linear_kl(
        student_hidden_ND,
        student_head_VD,
        student_bias_V,
        teacher_hidden_NE,
        teacher_head_VE,
        teacher_bias_V,
        float(temperature),
        float(student_softcap),
        float(teacher_softcap),
        chunk,
        wanted,
    )
    return out[0]


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


@torch.library.custom_op(LINEAR_KL, mutates_args=())
def _linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_bias: Tensor | None,
    temperature: float,
    student_softcap: float,
    teacher_softcap: float,
    chunk: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = implementation("linear_kl", student_hidden.device.type)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = run(
        student_hidden,
        student_head,
        student_bias,
        teacher_hidden,
        teacher_head,
        teacher_bias,
        temperature,
        student_softcap,
        teacher_softcap,
        chunk,
        with_gradients,
    )
    return result


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


def _scale(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients found in the forward pass, times that of the sum, in the dtype of each input."""
    grads = [
        None if dtype is None else (saved * grad_total).to(dtype)
        for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return (*grads, *(None for _ in range(ctx.num_inputs - 3)))


for _op in (_linear_kl, _linear_cross_entropy):
    _op.register_fake(_fake)
    _op.register_autograd(_scale, setup_context=_save)
