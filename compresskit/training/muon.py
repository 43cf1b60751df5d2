"""Muon for the matrices of a model's blocks, AdamW for everything else: one optimiser of torch's two.

Paper: Liu et al., "Muon is Scalable for LLM Training", 2025, https://arxiv.org/abs/2502.16982. Its scale of
updates is preset, so that a learning rate found for AdamW serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

OF_MUON = ("momentum", "nesterov", "ns_steps", "adjust_lr_fn")


class MuonAdamW(Optimizer):
    """Steps the groups that are marked ``muon`` with Muon, the others with AdamW.

    The groups and the state are shared with both, so whoever replaces parameters in the groups, restores a
    state dict or sets a learning rate reaches them.

    Args:
        params: groups; a group with ``muon: True`` has matrices alone.
        lr: of both.
        weight_decay: decoupled, of both.
        options: those of ``OF_MUON``, and ``betas`` and ``eps`` of AdamW.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0, **options: Any
    ) -> None:
        groups = list(params)
        mine = {name: options.pop(name) for name in OF_MUON if name in options}
        self._parts: dict[bool, Optimizer] = {}
        for muon, kind, own in ((True, Muon, mine), (False, AdamW, options)):
            some = [group for group in groups if bool(group.get("muon")) is muon and group["params"]]
            if some:
                self._parts[muon] = kind(some, lr=lr, weight_decay=weight_decay, **own)
        made = [group for part in self._parts.values() for group in part.param_groups]
        super().__init__(made, {"lr": lr, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for muon, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if bool(group["muon"]) is muon]
            part.state = self.state
            part.step()
        return loss
