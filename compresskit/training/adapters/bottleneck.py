"""Bottleneck adapters as a tuner of peft's: a small two-layer network behind each part of each block.

peft itself has none. This one is registered with peft when the module is imported, so that after
``import compresskit.training.adapters.bottleneck`` a directory with such an adapter loads with
``PeftModel.from_pretrained``; without it peft refuses the directory. It is not linear and cannot be merged.

Paper: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, https://arxiv.org/abs/1902.00751.
Shapes: B = rows, T = tokens, D = hidden width, R = width of the bottleneck.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

NAME = "BOTTLENECK"
FIRST = "bottleneck_"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What peft writes into adapter_config.json.

    Attributes:
        r: width of the bottleneck.
        width: of the hidden states.
        dropout: of the bottleneck's input.
        target_modules: the parts of blocks whose output is adapted.
    """

    r: int = 16
    width: int = 0
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    bias: str = field(default="none")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = NAME
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """``base_layer`` with h + up(relu(down(h))) for its output h, or for the first of its outputs."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        """What a block asks of its part, such as the kind of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter that changes nothing yet."""
        down, up = nn.Linear(config.width, config.r), nn.Linear(config.r, config.width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the part itself."""
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        return (self._adapted(output[0]), *output[1:]) if isinstance(output, tuple) else self._adapted(output)

    def _adapted(self, hidden_BTD: Tensor) -> Tensor:
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                # peft loads an adapter in float32 beside a model in 16 bits.
                given_BTD = self.bottleneck_dropout[name](hidden_BTD.to(down.weight.dtype))
                inner_BTR = F.relu(down(given_BTD))
                hidden_BTD = hidden_BTD + self.bottleneck_up[name](inner_BTR).to(hidden_BTD.dtype)
        return hidden_BTD


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """Puts a :class:`BottleneckLayer` around each target."""

    prefix = FIRST
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's own form)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            setattr(parent, target_name, BottleneckLayer(target, adapter_name, peft_config))


def register() -> None:
    """Make the kind known to peft, whose tables are keyed by its name."""
    tables: tuple[tuple[Any, Any], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, BottleneckConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, BottleneckModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, FIRST),
    )
    for table, entry in tables:
        table[NAME] = entry


register()
