"""Do documents packed into one row see each other? Found out by trying, not from a list of models.

Rows hold several documents, told apart by positions that begin again. Most models of transformers then keep
attention inside a document; one that ignores the positions, has a state that runs on, or attends to what
comes later does not, and would learn from text that is not there when the model is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.errors import Fault
from compresskit.modeling import Anatomy
from compresskit.modeling.skeleton import model_class
from compresskit.training.logits import projection_fault, projects_otherwise
from compresskit.training.outlook import scale_faults

DOCUMENT = 4
"""Tokens of each of the two documents that are tried."""
PROBE_VOCABULARY = 64
PROBE_PARAMETERS = 300_000_000
"""A probe has one block; a larger one would take too long to make, and the model itself is tried later."""
NOISE = {torch.float32: 1e-4}
ROUGH_NOISE = 1e-2
"""Relative difference that rounding alone can make; attention that leaks makes far more."""

Hidden = Callable[[Tensor, Tensor], Tensor]


def sees_across(hidden: Hidden) -> bool:
    """Whether a document changes with the one packed before it.

    Args:
        hidden: ids and positions, int64 (1, T) each, to hidden states (1, T, D); deterministic.
    """
    positions = torch.arange(DOCUMENT).repeat(2)[None]
    second = torch.arange(1, 1 + DOCUMENT)
    found = []
    for first in (torch.arange(DOCUMENT), torch.arange(DOCUMENT, 2 * DOCUMENT)):
        with torch.no_grad():
            states = hidden(torch.cat((first, second))[None], positions)
        found.append(states[0, DOCUMENT:])
    one, other = (states.float() for states in found)
    noise = NOISE.get(found[0].dtype, ROUGH_NOISE)
    return bool((one - other).norm() > noise * one.norm())


def model_sees_across(model: nn.Module) -> bool:
    """:func:`sees_across` for a live model, whose mode is left as it was."""
    base: Any = getattr(model, "base_model", model)
    trains = model.training
    model.eval()
    try:
        return sees_across(lambda ids, at: base(input_ids=ids, position_ids=at, use_cache=False)[0])
    finally:
        model.train(trains)


def probed_faults(
    where: str,
    config: Any,
    anatomy: Anatomy,
    directory: Path,
    *,
    trust_remote_code: bool,
    isolated: bool = True,
) -> list[Fault]:
    """What one block of such a model with random weights tells at plan time.

    Args:
        where: prefix of the fault.
        config: of the model; not changed.
        anatomy: of the model.
        directory: of the model, for code of its own.
        trust_remote_code: whether that code may run.
        isolated: whether documents must not see each other.

    Returns:
        Whether they do, in a model where they must not, and whether its logits are others than the losses
        would make; nothing where no such block can be made. That documents are apart is tried again, of the
        model itself, before it trains.
    """
    if not anatomy.blocks:
        return []
    block = f"{anatomy.blocks[0]}."
    size = sum(prod(shape) for name, shape in anatomy.parameter_shapes.items() if name.startswith(block))
    if size > PROBE_PARAMETERS:
        return []
    faults, name = [], type(config).__name__
    with suppress(Exception):  # whatever a model's code raises over a configuration that nobody meant for it
        probe = _probe(config, len(anatomy.blocks), directory, trust_remote_code)
        if isolated and model_sees_across(probe):
            faults.append(isolation_fault(where, name))
        if not scale_faults(config, where) and projects_otherwise(probe):
            faults.append(projection_fault(where, name))
    return faults


def isolation_fault(where: str, model: str) -> Fault:
    """The fault of a ``model`` whose packed documents see each other."""
    return Fault(
        where,
        "a model that keeps documents apart which are packed into one row",
        f"{model}, in which they see each other",
        "Set data: {..., cross_documents: true} to train with documents that see each other.",
    )


def _probe(config: Any, blocks: int, directory: Path, trust_remote_code: bool) -> nn.Module:
    """One block of the real widths and a few token ids, random weights, on the CPU in float32."""
    data = config.to_dict()
    for key, value in data.items():
        if isinstance(value, list) and len(value) == blocks and key != "architectures":
            data[key] = value[:1]
    names = getattr(config, "attribute_map", {})
    data |= {names.get("num_hidden_layers", "num_hidden_layers"): 1}
    data |= {names.get("vocab_size", "vocab_size"): PROBE_VOCABULARY}
    data |= {key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in data}
    small = type(config).from_dict(data)
    cls: Any = model_class(small, directory, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls._from_config(deepcopy(small), dtype=torch.float32)
    return model
