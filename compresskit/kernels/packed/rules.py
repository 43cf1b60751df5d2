"""What the ops of packed layouts do alike: whom they refuse, who computes them, their gradients.

Shapes: O = outputs, I = inputs, R = rows, C = groups of four inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import EngineError, Fault, PatternError
from compresskit.kernels.bitmap import VALUE_TYPES
from compresskit.kernels.cpu.build import Unavailable
from compresskit.kernels.dispatch import forgo, implementation, reference
from compresskit.kernels.packed.base import Case

GROUP = 4
INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def type_refusal(case: Case) -> str:
    """Why the types of ``case`` are not multiplied by any packed layout; empty where they are."""
    for what, dtype, known in (
        ("values", case.values, VALUE_TYPES),
        ("inputs", case.inputs, INPUT_TYPES),
    ):
        if dtype not in known:
            names = ", ".join(str(one).removeprefix("torch.") for one in known)
            return f"{what} are {str(dtype).removeprefix('torch.')}, not one of {names}"
    return ""


def check_width(op: str, inputs: Tensor, words: int, word_inputs: int) -> None:
    """Refuse inputs of another width than the weight's, which packed words tell but for the last one.

    Raises:
        ValueError: they differ.
    """
    width = inputs.shape[-1]
    if -(-width // word_inputs) != words:
        least = (words - 1) * word_inputs + 1
        raise ValueError(f"{op}: the weight has {least} to {words * word_inputs} inputs, the inputs {width}")


def runner(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The function that computes ``op``; in float64, which is for checks, that is the reference."""
    if dtype == torch.float64:
        return reference(op)
    run = implementation(op, device.type)

    def run_or_reference(*given: Any) -> Any:
        try:
            return run(*given)
        except Unavailable as error:  # for these values: dispatch has tried others
            return forgo(op, "cpu", str(error))(*given)

    return run_or_reference


def complete(
    linear: Any,
    expand: Any,
    outputs: Callable[[Sequence[Tensor]], int],
    *,
    gradient: Any = None,
    values: int = 0,
) -> None:
    """Give a layout's ops what torch wants besides: their shapes, and gradients.

    Args:
        linear: of the inputs, the packed tensors, and a bias or None; inputs and bias have gradients.
        expand: of the packed tensors, the number of inputs, and a type: the dense weight (O, I).
        outputs: O, from the packed tensors.
        gradient: of the result's gradient, the inputs, and the packed tensors: that of the values; None
            where the weight is frozen.
        values: which of the packed tensors they are.
    """

    def linear_shape(inputs: Tensor, *rest: Any) -> Tensor:
        return inputs.new_empty((*inputs.shape[:-1], outputs(rest[:-1])))

    def expand_shape(*given: Any) -> Tensor:
        *packed, in_features, dtype = given
        empty: Tensor = packed[0].new_empty((outputs(packed), in_features), dtype=dtype)
        return empty

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *packed, bias_O = inputs
        asked = {at for at in range(len(packed)) if ctx.needs_input_grad[1 + at]}
        ctx.trains = gradient is not None and values in asked
        _require_frozen(linear, len(asked) - ctx.trains, gradient is not None)
        ctx.in_features, ctx.bias_type = x.shape[-1], None if bias_O is None else bias_O.dtype
        ctx.save_for_backward(*packed, *([x] if ctx.trains else []))

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, to_inputs, to_bias = ctx.saved_tensors, None, None
        to_packed: list[Tensor | None] = [None] * (len(packed) - ctx.trains)
        if ctx.trains:
            *packed, x = packed
            to_packed[values] = gradient(grad, x, *packed)
        if ctx.needs_input_grad[0]:
            to_inputs = grad @ expand(*packed, ctx.in_features, grad.dtype)
        if ctx.bias_type is not None and ctx.needs_input_grad[-1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_type)
        return (to_inputs, *to_packed, to_bias)

    if gradient is not None:
        gradient.register_fake(lambda grad, x, *packed: torch.empty_like(packed[values]))
    linear.register_fake(linear_shape)
    expand.register_fake(expand_shape)
    linear.register_autograd(gradients, setup_context=keep)


def _require_frozen(linear: Any, others: int, trains: bool) -> None:
    """Refuse to leave without a gradient what asks for one.

    Raises:
        EngineError: some of the packed tensors do that have none.
    """
    if others:
        expected = "values alone that require a gradient" if trains else "a weight that requires no gradient"
        cure = "Pack it in the layout bitmap, whose values have one, or freeze it."
        raise EngineError(Fault(linear._name, expected, f"{others} packed tensors that do", cure))


def two_of_four_refusal(case: Case) -> str:
    """Why no two of every four consecutive inputs can be relied on; empty where they can."""
    if case.group is None:
        return "nothing says that no four consecutive inputs keep more than two"
    keep, of = case.group
    if not ((keep <= 2 and of % GROUP == 0) or (keep, of) == (1, 2)):
        return f"of {of} consecutive inputs {keep} are kept, which may be more than two of four"
    return ""


def require_two_of_four(keep_RC4: Tensor, layout: str) -> None:
    """Refuse a weight of whose groups of four, (..., 4) bool, one keeps more than two.

    Raises:
        PatternError: it names the row and the group.
    """
    over_RC = keep_RC4.sum(-1) > 2
    if bool(over_RC.any()):
        row, group = over_RC.nonzero()[0].tolist()
        got = f"{int(keep_RC4[row, group].sum())} in group {group} of row {row}"
        cure = "Choose another layout for this weight."
        raise PatternError(Fault(layout, "two kept weights of every four at most", got, cure))
