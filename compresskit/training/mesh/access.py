"""Parameters of layers that are split among ranks, each of which computes with its own part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from compresskit.training.access import New, ParamAccess, Sharded, Whole, access_for, own_part
from compresskit.training.setting import Setting


class Split(Sharded):
    """Tensor parallelism alone: a DTensor where a layer is split, else whole and the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        self._rest = Whole()

    def drop(self) -> None:
        """See :meth:`ParamAccess.drop`."""
        super().drop()
        self._rest.drop()

    def local(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a layer, or all of it."""
        return own_part(parameter)

    def mask_gradient(self, parameter: nn.Parameter) -> Callable[[], None]:
        """See :meth:`ParamAccess.mask_gradient`; nothing reduces the gradient of this rank's part."""
        if not _is_split(parameter):
            return self._with_rest().mask_gradient(parameter)

        def mask(gradient: Any) -> Any:
            sharded: Any = parameter
            gradient = gradient.redistribute(placements=sharded.placements)
            if self.collecting:
                found = self._sums.get(parameter)
                self._sums[parameter] = gradient.detach() if found is None else found + gradient.detach()
            return gradient * (sharded.detach() != 0)

        handle: Any = parameter.register_hook(mask)  # type: ignore[no-untyped-call]
        remove: Callable[[], None] = handle.remove
        return remove

    def change(self, parameter: nn.Parameter, optimizer: Any, new: New) -> None:
        """See :meth:`ParamAccess.change`."""
        if _is_split(parameter):
            super().change(parameter, optimizer, new)
        else:
            self._with_rest().change(parameter, optimizer, new)

    def _with_rest(self) -> Whole:
        self._rest.collecting = self.collecting
        return self._rest


def _is_split(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "to_local")


def access_under(setting: Setting) -> ParamAccess:
    """The access to parameters under ``setting``."""
    return Split() if setting.strategy == "tp" else access_for(setting.strategy, setting.fields.zero_stage)
