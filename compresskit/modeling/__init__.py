"""The door to transformers: checkpoints, skeletons, what a model consists of, blocks one at a time."""

from __future__ import annotations

from compresskit.modeling.anatomy import Anatomy, Linear
from compresskit.modeling.fetch import copy_sidecars
from compresskit.modeling.skeleton import (
    context_length,
    load_model,
    load_tokenizer,
    resolve_device,
    skeleton,
    text_ids,
)
from compresskit.modeling.source import ModelSource, open_model
from compresskit.modeling.streaming import StreamedModel

__all__ = [
    "Anatomy",
    "Linear",
    "ModelSource",
    "StreamedModel",
    "context_length",
    "copy_sidecars",
    "load_model",
    "load_tokenizer",
    "open_model",
    "resolve_device",
    "skeleton",
    "text_ids",
]
