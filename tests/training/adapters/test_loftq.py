"""LoftQ's start against its definition, round by round."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.training.adapters.bits import rounded
from compresskit.training.adapters.loftq import loftq
from compresskit.training.adapters.merge import update


def round_nf4(weight_OI: Tensor) -> Tensor:
    return rounded(weight_OI, "nf4")


def error(weight_OI: Tensor, rounds: int, keep_OI: Tensor | None = None) -> float:
    if not rounds:
        return float((weight_OI - round_nf4(weight_OI)).norm())
    start = loftq(weight_OI, round_nf4, rank=4, scaling=2.0, rounds=rounds, keep_OI=keep_OI)
    whole_OI = round_nf4(start.rest_OI) + update(start.a_RI, start.b_OR, 2.0, keep_OI)
    return float((weight_OI - whole_OI).norm())


def test_one_round_is_the_best_approximation_of_the_rounding_error() -> None:
    weight_OI = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    start = loftq(weight_OI, round_nf4, rank=4, scaling=2.0, rounds=1)
    error_OI = weight_OI - round_nf4(weight_OI)
    values = torch.linalg.svdvals(error_OI)
    left = error_OI - update(start.a_RI, start.b_OR, 2.0)
    torch.testing.assert_close(left.norm(), values[4:].norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(start.a_RI.norm(), start.b_OR.norm(), rtol=1e-5, atol=0)


def test_more_rounds_come_closer_than_plain_rounding() -> None:
    weight_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    errors = [error(weight_OI, rounds) for rounds in (0, 1, 5)]
    assert errors[0] > errors[1] > errors[2]


def test_zeros_that_are_held_stay_in_rest_and_update() -> None:
    weight_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    keep_OI = weight_OI.abs() > 0.7
    weight_OI = weight_OI * keep_OI
    start = loftq(weight_OI, round_nf4, rank=4, scaling=2.0, rounds=3, keep_OI=keep_OI)
    assert (start.rest_OI[~keep_OI] == 0).all()
    assert error(weight_OI, 3, keep_OI) < error(weight_OI, 0)
