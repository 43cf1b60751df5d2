"""Distillation: what a student learns from a teacher. One loss a file; this table is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.registry import Registry

if TYPE_CHECKING:  # keeps torch out of `compresskit --help`
    from compresskit.distill.base import DistillLoss

LOSSES: Registry[DistillLoss] = Registry(
    "distillation loss",
    {
        "forward_kl": "compresskit.distill.forward_kl:ForwardKL",
    },
)
