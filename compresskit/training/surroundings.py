"""What a training run changes and puts back: environment, progress bars, the types of the weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from compresskit.training.activations import saving_activations
from compresskit.training.extensions import compiled_despite_kills
from compresskit.training.fields import TrainingFields
from compresskit.training.fp8 import fp8_products
from compresskit.training.int8 import int8_products

SWITCHES = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_USE_CPU",
)


@contextmanager
def surroundings(strategy: str) -> Iterator[None]:
    """Of one training: Accelerate leaves switches behind that would decide the engine of a later stage."""
    before = {name: os.environ.get(name) for name in SWITCHES}
    try:
        with compiled_despite_kills() if strategy == "deepspeed" else nullcontext():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if "deepspeed" in sys.modules:
            # Else from_pretrained would partition what a later stage loads.
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own in between ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def trainable(model: nn.Module, fields: TrainingFields) -> Iterator[dict[str, torch.dtype]]:
    """fp32 weights while this lasts; yields each tensor's own dtype."""
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    model.float()
    try:
        with (
            saving_activations(model, fields),
            int8_products(model) if fields.matmul == "int8" else nullcontext(),
            fp8_products(model) if fields.precision == "fp8" else nullcontext(),
        ):
            yield dtypes
    finally:
        if config is not None and before is not None:
            config.use_cache = before  # transformers' Trainer sets it to False and leaves it so
        _restore(model, dtypes)


def _restore(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give whole tensors their own dtype again; an engine's shards are left to it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in dtypes and type(tensor.data) is Tensor and tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])
