"""Kullback-Leibler divergence of a student from a teacher, fused with both output projections.

For each token sum_v p_v (log p_v - log q_v) with p, q the softmaxes of the teacher's and the student's
logits over the temperature. No (N, V) tensor is ever whole: tokens are taken a few at a time and their
gradients are computed on the spot, so the backward pass needs no logits again.

Paper: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531.

Shapes: N = tokens, D = student's hidden width, E = teacher's, V = vocabulary, C = tokens of one chunk.
"""

from __future__ import annotations

from torch import Tensor

from compresskit.kernels.reference.projection import Gradients, Projection, accumulator, chunks


def linear_kl(
    student_hidden_ND: Tensor,
    student_head_VD: Tensor,
    student_bias_V: Tensor | None,
    teacher_hidden_NE: Tensor,
    teacher_head_VE: Tensor,
    teacher_bias_V: Tensor | None,
    temperature: float,
    student_softcap: float,
    teacher_softcap: float,
    chunk: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the divergence over all tokens, in nats, and its gradients.

    Args:
        student_hidden_ND: (N, D), any float dtype; matrix products run in it, sums in fp32 (or fp64).
        student_head_VD: (V, D).
        student_bias_V: (V,) or None.
        teacher_hidden_NE: (N, E).
        teacher_head_VE: (V, E).
        teacher_bias_V: (V,) or None.
        temperature: divides the logits of both; the sum is not multiplied by its square.
        student_softcap: bound of the student's logits; 0 for none.
        teacher_softcap: bound of the teacher's logits; 0 for none.
        chunk: tokens at a time; 0 chooses.
        with_gradients: else the gradients come back empty.

    Returns:
        The sum, and the gradients of the student's hidden states, head and bias, in fp32 (or fp64).
    """
    student = Projection(student_head_VD.to(student_hidden_ND.dtype), student_bias_V, student_softcap)
    teacher = Projection(teacher_head_VE.to(teacher_hidden_NE.dtype), teacher_bias_V, teacher_softcap)
    total = student_hidden_ND.new_zeros((), dtype=accumulator(student_hidden_ND.dtype))
    gradients = Gradients.zeros(student_hidden_ND, student_head_VD, with_gradients)
    device = student_hidden_ND.device.type
    for part in chunks(student_hidden_ND.shape[0], student_head_VD.shape[0], device, chunk):
        log_p_CV = (teacher.logits(teacher_hidden_NE[part]) / temperature).log_softmax(-1).to(total.dtype)
        logits_CV = student.logits(student_hidden_ND[part])
        log_q_CV = (logits_CV / temperature).log_softmax(-1)
        p_CV = log_p_CV.exp()
        total += (p_CV * (log_p_CV - log_q_CV)).sum()
        if with_gradients:
            grad_CV = log_q_CV.exp_().sub_(p_CV).div_(temperature)
            grad_CV = student.through_softcap(grad_CV, logits_CV)
            gradients.add(part, student_hidden_ND[part], student, grad_CV)
    return total, gradients.hidden_ND, gradients.head_VD, gradients.bias_V
