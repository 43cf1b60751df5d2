"""Adapters of peft on a model whose weights are frozen already.

The model that is trained is the one inside peft's wrapper: adapters live in its layers, so its forward, its
blocks and its output projection are found where every trainer looks for them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from compresskit.formats.checkpoint import ADAPTER as ADAPTER_DIRECTORY
from compresskit.formats.files import save_tensors
from compresskit.modeling.anatomy import Anatomy
from compresskit.training.adapters.masked import ADAPTER
from compresskit.training.adapters.outlook import parts_of
from compresskit.training.adapters.prefix import PREFIX
from compresskit.training.trainable import LOW_RANK

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INSIDE = "base_model.model."
"""What peft puts before the names of a wrapped model's own modules."""


def attach(
    model: Any,
    adapter: str,
    *,
    anatomy: Anatomy,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float,
) -> Any:
    """Wrap ``model``, in place, with a new adapter; only its parameters take a gradient.

    Args:
        model: a causal language model of transformers, on the CPU or on meta; frozen.
        adapter: ``lora``, ``dora``, ``prefix`` or ``bottleneck``.
        anatomy: of the model before its layers were frozen.
        targets: names of linear layers, for LoRA and DoRA.
        rank: of LoRA, width of a bottleneck, virtual tokens of a prefix.
        alpha: LoRA's update is multiplied by alpha / rank.
        dropout: of the adapter's input.

    Returns:
        The ``PeftModelForCausalLM``; ``get_base_model()`` of it is ``model``.
    """
    with peft_at_work():
        import peft

        config: Any
        if adapter in LOW_RANK:
            config = peft.LoraConfig(
                task_type="CAUSAL_LM",
                r=rank,
                lora_alpha=cast(int, alpha),  # peft takes any number
                lora_dropout=dropout,
                target_modules=list(targets),
                use_dora=adapter == "dora",
                # As the layers are now: frozen ones are torch.nn.Linear whatever they were.
                fan_in_fan_out=any(type(model.get_submodule(t)).__name__ == "Conv1D" for t in targets),
            )
        elif adapter == "prefix":
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rank)
        else:
            from compresskit.training.adapters.bottleneck import BottleneckConfig

            width = model.config.get_text_config().hidden_size
            parts = list(parts_of(anatomy))
            config = BottleneckConfig(
                task_type="CAUSAL_LM", r=rank, width=width, dropout=dropout, target_modules=parts
            )
        return peft.get_peft_model(model, config)


def write_adapter(tuned: Any, tensors: Mapping[str, Tensor], out: Path) -> None:
    """Write an adapter's directory, as ``PeftModel.from_pretrained`` reads it.

    Args:
        tuned: from :func:`attach`; its weights are not looked at.
        tensors: the trained ones, under their names in the model inside ``tuned``.
        out: directory to make.
    """
    from peft.utils import get_peft_model_state_dict

    out.mkdir()
    config = tuned.peft_config[ADAPTER]
    if getattr(config, "is_prompt_learning", False):
        stem = next(name for name in tensors if f"{PREFIX}.embedding." in name)
        named = {"prompt_embeddings": tensors[stem]}
    else:
        inside = {INSIDE + name: tensor for name, tensor in tensors.items()}
        named = get_peft_model_state_dict(tuned, state_dict=inside, save_embedding_layers=False)
    save_tensors(out / WEIGHTS, {k: v.contiguous() for k, v in sorted(named.items())}, {"format": "pt"})
    before, config.inference_mode = config.inference_mode, True
    for name, value in list(vars(config).items()):
        if isinstance(value, set):  # peft writes its members in an order that differs from start to start
            setattr(config, name, sorted(value))
    config.save_pretrained(str(out))
    config.inference_mode = before


def with_adapter(model: Any, directory: Path) -> Any:
    """``model`` as peft has it with the adapter that stands beside it; ``model`` itself where there is none.

    Args:
        model: loaded from ``directory``.
        directory: of the model.
    """
    place = directory / ADAPTER_DIRECTORY
    if not place.is_dir():
        return model
    with peft_at_work():
        import peft

        if json.loads((place / CONFIG).read_text(encoding="utf-8"))["peft_type"] == "BOTTLENECK":
            from compresskit.training.adapters import bottleneck

            bottleneck.register()
        return peft.PeftModel.from_pretrained(model, str(place)).eval()


@contextmanager
def peft_at_work() -> Iterator[None]:
    """No warning from peft that is about peft's own use of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@contextmanager
def marked(model: nn.Module, base: str) -> Iterator[None]:
    """While this lasts, peft sees by which package the model's weights were quantised."""
    flag = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}.get(base)
    if flag is None:
        yield
        return
    before = model.__dict__.get(flag)
    model.__dict__[flag] = True
    try:
        yield
    finally:
        # Trainer and Accelerate would take such a model for one of their own loading.
        if before is None:
            del model.__dict__[flag]
        else:
            model.__dict__[flag] = before
