"""The quantizer that transformers' ``from_pretrained`` and ``save_pretrained`` ask about bitmask checkpoints.

transformers imports this while it is itself half imported: so nothing of ours that needs transformers is
imported before a model is loaded. See ``compresskit.registration``.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compresskit.formats.bitmask import METHOD

ASKED = ("layout", "resident", "device")


@register_quantization_config(METHOD)
class BitmaskConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of config.json, and what was asked for while loading, which is not saved.

    Args:
        layout: of every layer; see ``compresskit.kernels.choice.Wish``.
        resident: which layouts stay in memory; the same.
        device: to compute on, if another than the one weights are read onto.
        said: what config.json says.
    """

    def __init__(self, *, layout: str = "", resident: str = "", device: str = "", **said: Any) -> None:
        self.quant_method: Any = METHOD
        self.said = {**said, "quant_method": METHOD}
        self.layout, self.resident, self.device = layout, resident, device

    def to_dict(self) -> dict[str, Any]:
        """What config.json says."""
        return dict(self.said)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@register_quantizer(METHOD)
class BitmaskQuantizer(HfQuantizer):  # type: ignore[misc]
    """Has packed layers made before weights are read, and settled after."""

    quantization_config: BitmaskConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to pack a model that is dense.

        Raises:
            FormatError: there is a better way.
        """
        if not self.pre_quantized:
            from compresskit.errors import Fault, FormatError

            cure = "Write it so first: compresskit export MODEL --to bitmask -o DIR."
            raise FormatError(Fault("from_pretrained", "a bitmask checkpoint", "a dense one", cure))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from compresskit.modeling.bitmask_quantizer import prepare

        files = kwargs.get("checkpoint_files")
        self.places = prepare(model, self.quantization_config.to_dict(), files)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from compresskit.modeling.bitmask_quantizer import finish

        asked = {name: getattr(self.quantization_config, name) for name in ASKED}
        finish(model, self.places, **asked)
        return model

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[None, dict[str, str]]:
        """Before it is saved: config.json says what the layers are by now."""
        from compresskit.modeling.bitmask_quantizer import config_now

        self.quantization_config.said = config_now(model, self.quantization_config.said)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """The state of each layer is the checkpoint's."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed layers to adapters before them."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """``SparseLinear.train_values`` has the kept weights themselves learn; without it they are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile traces packed layers as it does others."""
        return True
