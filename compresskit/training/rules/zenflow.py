"""What does not combine: DeepSpeed's ZenFlow, whose weights are stepped late. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from compresskit.errors import Fault
from compresskit.training.rules.asynchronous import ZENFLOW
from compresskit.training.rules.base import Rule, swaps_layers
from compresskit.training.setting import Setting

MENDED = "0.19.8"
"""The version of DeepSpeed whose faults are mended; others have others."""
SPAN = 4
"""Late updates from one choice of columns to the next."""
SELECTED = 0.1
"""Of the columns of each matrix, those that are stepped at once."""


def span(every: int) -> int:
    """Steps from one choice of columns to the next, with so many from one late update to the next."""
    return SPAN * every


def shape_faults(shapes: Mapping[str, Sequence[int]], where: str) -> list[Fault]:
    """Why ZenFlow cannot step parameters of such shapes: it steps columns of matrices, and whole vectors.

    Args:
        shapes: of every parameter that is trained, by its name.
        where: prefix of the fault, which names the first of them.
    """
    odd = [name for name, shape in shapes.items() if len(shape) != 1 and (len(shape) != 2 or shape[0] == 1)]
    if not odd:
        return []
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    got = f"{odd[0]} of {tuple(shapes[odd[0]])}{more}"
    expected = "parameters that are vectors, or matrices of several rows, beside synchronise zenflow"
    return [Fault(f"{where}.synchronise", expected, got, "Use synchronise every_step.")]


def _runs(s: Setting) -> bool:
    """Whether it is asked for, of an engine that has it."""
    return s.fields.synchronise == ZENFLOW and not _elsewhere(s)


def _elsewhere(s: Setting) -> bool:
    fields = s.fields
    has_it = s.strategy == "deepspeed" and fields.zero_stage == 2 and fields.offload == "optimizer"
    return not (has_it and fields.offload_device == "cpu" and fields.deepspeed_config is None)


def _unknown() -> bool:
    try:
        return version("deepspeed").partition("+")[0] != MENDED
    except PackageNotFoundError:
        return False  # told by another rule


def _compiles() -> bool:
    """Whether DeepSpeed's Adam for CPUs, which it compiles at first use, can be compiled here."""
    return bool(shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja"))


def _own_adam(s: Setting) -> bool:
    fields = s.fields
    return fields.optimizer == "adamw_torch" and not fields.optimizer_options and fields.weight_decay == 0


def _not_learnt_late(s: Setting) -> bool:
    """Whether weights are not stepped as they are, or some take no gradient."""
    of_stage = s.fields.learns_sentences or getattr(s.fields, "kind", "") == "sparse_train"
    of_stage = of_stage or getattr(s.fields, "trainable", "all") != "all"
    return swaps_layers(s) or of_stage or getattr(s.fields, "on_policy", None) is not None


RULES: tuple[Rule, ...] = (
    Rule(
        "zenflow-engine",
        "synchronise",
        lambda s: s.fields.synchronise == ZENFLOW and _elsewhere(s),
        "strategy deepspeed with zero_stage 2 and offload optimizer to the CPU, without a deepspeed_config",
        "strategy {strategy}, zero_stage {zero_stage}, offload {offload}",
        "Set these beside synchronise zenflow, or use synchronise every_step.",
    ),
    Rule(
        "zenflow-version",
        "synchronise",
        lambda s: _runs(s) and _unknown(),
        f"deepspeed {MENDED}, whose faults are known, for synchronise zenflow",
        "another version",
        f"Install it with `pip install deepspeed=={MENDED}`, or use synchronise every_step.",
    ),
    Rule(
        "zenflow-compiler",
        "synchronise",
        lambda s: _runs(s) and not _compiles(),
        "a C++ compiler and ninja, by which DeepSpeed makes its Adam for CPUs, for synchronise zenflow",
        "a PATH without them",
        "Install them (Debian: `apt install g++ ninja-build`), or use synchronise every_step.",
    ),
    Rule(
        "zenflow-every",
        "synchronise_every",
        lambda s: _runs(s) and s.fields.synchronise_every == 1,
        "at least 2 steps from one late update to the next",
        "{synchronise_every}",
        "Raise synchronise_every, or use synchronise every_step.",
    ),
    Rule(
        "zenflow-optimizer",
        "optimizer",
        lambda s: _runs(s) and not _own_adam(s),
        "adamw_torch with weight_decay 0 and no optimizer_options, which is the Adam that ZenFlow has",
        "{optimizer} with weight_decay {weight_decay}",
        "Use optimizer adamw_torch without these, or synchronise every_step.",
    ),
    Rule(
        "zenflow-passes",
        "micro_batch_size",
        lambda s: _runs(s) and s.micro_batch_size * s.data_ranks < s.fields.batch_size,
        "one forward pass a step beside synchronise zenflow, which counts passes as steps",
        "{batch_size} rows a step in passes of {micro_batch_size} on {processes}",
        "Leave micro_batch_size out, or lower batch_size.",
    ),
    Rule(
        "zenflow-checkpoints",
        "checkpoint_every",
        lambda s: (
            _runs(s)
            and s.fields.synchronise_every > 1
            and s.fields.checkpoint_every % span(s.fields.synchronise_every) != 0
        ),
        f"0, or a multiple of {SPAN} times synchronise_every, after which no update is owed",
        "checkpoint_every={checkpoint_every}, synchronise_every={synchronise_every}",
        "Choose such a checkpoint_every; the default of 100 is one beside synchronise_every 5.",
    ),
    Rule(
        "zenflow-overlap",
        "overlap",
        lambda s: _runs(s) and s.fields.overlap,
        "false beside synchronise zenflow, where DeepSpeed does not keep exchanges under way from its copies "
        "to the CPU",
        "true",
        "Set overlap to false.",
    ),
    Rule(
        "zenflow-from",
        "synchronise_from",
        lambda s: _runs(s) and s.fields.synchronise_from != 0,
        "0 beside synchronise zenflow",
        "{synchronise_from}",
        "Leave synchronise_from out.",
    ),
    Rule(
        "zenflow-stage",
        "synchronise",
        lambda s: _runs(s) and _not_learnt_late(s),
        "every_step in a stage that moves zeros, swaps layers, trains a part of the weights, learns "
        "sentences or is on_policy",
        "{synchronise}",
        "Use synchronise every_step here; finetune and distill of whole weights may use zenflow.",
    ),
)
