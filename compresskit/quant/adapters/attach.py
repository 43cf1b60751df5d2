"""Adapters of peft on a model whose weights are frozen already, by the names of ``Qlora``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compresskit.formats.checkpoint import ADAPTER as ADAPTER_DIRECTORY
from compresskit.formats.files import save_tensors
from compresskit.modeling.anatomy import Anatomy
from compresskit.quant.adapters.prefix import PREFIX
from compresskit.quant.qlora import LOW_RANK
from compresskit.training.lowrank.attach import ADAPTER, attach_lora, peft_at_work

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
    if adapter in LOW_RANK:
        dora = adapter == "dora"
        return attach_lora(model, targets=targets, rank=rank, alpha=alpha, dropout=dropout, use_dora=dora)
    with peft_at_work():
        import peft

        config: Any
        if adapter == "prefix":
            config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=rank)
        else:
            from compresskit.quant.adapters.bottleneck import BottleneckConfig

            width = model.config.get_text_config().hidden_size
            parts = list(parts_of(anatomy))
            config = BottleneckConfig(
                task_type="CAUSAL_LM", r=rank, width=width, dropout=dropout, target_modules=parts
            )
        return peft.get_peft_model(model, config)


def parts_of(anatomy: Anatomy) -> tuple[str, ...]:
    """The direct children of blocks that hold linear layers: attention and feed-forward network, usually."""
    found: dict[str, None] = {}
    for name, linear in anatomy.linears.items():
        if linear.block is not None:
            child = name.removeprefix(linear.block + ".").partition(".")[0]
            found[f"{linear.block}.{child}"] = None
    return tuple(found)


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
            from compresskit.quant.adapters import bottleneck

            bottleneck.register()
        return peft.PeftModel.from_pretrained(model, str(place)).eval()


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
