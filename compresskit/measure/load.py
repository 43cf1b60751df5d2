"""Load a model the way its users do: the Auto class its config names, and nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from compresskit.errors import Fault, ModelError
from compresskit.modeling.quiet import hush, without_bars
from compresskit.training.adapters.attach import with_adapter

# Tried in order; the first whose table lists the architecture is what users load it with.
AUTO_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
)


def auto_class(directory: Path) -> str:
    """The name of the Auto class for the checkpoint in ``directory``; ``AutoModel`` where no head is known.

    Raises:
        ModelError: ``directory`` has no readable config.json.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            Fault(str(path), "the config.json of a model", str(error), "Give the directory of a model.")
        ) from error
    architecture = (config.get("architectures") or [""])[0]
    if "AutoModelForCausalLM" in config.get("auto_map", {}):
        return "AutoModelForCausalLM"
    for name, table in AUTO_CLASSES:
        if architecture in _names(getattr(modeling_auto, table)):
            return name
    return "AutoModel"


def _names(table: Any) -> set[str]:
    """The class names of one of transformers' tables, whose values are names or tuples of them."""
    return {n for value in table.values() for n in ((value,) if isinstance(value, str) else value)}


def is_causal(directory: Path) -> bool:
    """Whether the checkpoint in ``directory`` predicts the next token."""
    return auto_class(directory) == "AutoModelForCausalLM"


def load_model(directory: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The model in ``directory`` in evaluation mode, as ``from_pretrained`` gives it: peft's, for an adapter.

    Args:
        directory: a Hugging Face checkpoint, compressed or not.
        device: ``cpu``, ``cuda`` or ``cuda:0``.
        trust_remote_code: whether code in the directory may run.

    Returns:
        The ``torch.nn.Module``, in the dtype it is stored in.

    Raises:
        ModelError: it cannot be loaded; the message is transformers'.
    """
    cls = getattr(transformers, auto_class(directory))
    try:
        with without_bars():
            model = cls.from_pretrained(directory, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            Fault(
                str(directory),
                f"a checkpoint that {cls.__name__}.from_pretrained loads",
                f"{type(error).__name__}: {error}",
                "Mend the checkpoint, or install what the message asks for.",
            )
        ) from error
    hush(model)
    return with_adapter(model.to(device).eval(), directory)


def empty_model(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's structure on the meta device: every import is made, no weight is read."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    cls = getattr(transformers, auto_class(directory))
    with torch.device("meta"):
        return cls.from_config(config, trust_remote_code=trust_remote_code)


def max_positions(config: Any) -> int:
    """The longest sequence a model of ``config`` takes, in tokens.

    Raises:
        ModelError: the config states none.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value
    raise ModelError(
        Fault("config.json", "max_position_embeddings", "none", "State context_length in the call.")
    )
