"""What does not combine: DeepSpeed and a ds_config.json of the user's own. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compresskit.training.rules.base import Rule
from compresskit.training.setting import Setting

AUTO = "auto"
SECTIONS = ("zero_optimization", "bf16", "fp16")
"""Keys of a ds_config.json that have objects, into which rules look."""


def _config_stage(s: Setting) -> bool:
    """Whether the user's ds_config.json names another ZeRO stage than the recipe."""
    stage = read_config(s).get("zero_optimization", {}).get("stage", AUTO)
    return stage not in (AUTO, s.fields.zero_stage)


def config_at(path: str | None) -> dict[str, Any] | None:
    """What the ds_config.json at ``path`` says; None without one, or where it or a section is no object."""
    try:
        config = json.loads(Path(path or "").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    return config if all(isinstance(config.get(name, {}), dict) for name in SECTIONS) else None


def read_config(s: Setting) -> dict[str, Any]:
    """The user's ds_config.json; empty without one that can be read."""
    return (s.strategy == "deepspeed" and config_at(s.fields.deepspeed_config)) or {}


NUMBERS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "passes",
    "gradient_clipping": "max_grad_norm",
}
"""Keys of a ds_config.json that fix a number -> what of the setting, or of its fields, it follows from."""
OFFLOADED = ("offload_optimizer", "offload_param")
"""Keys of ``zero_optimization`` whose objects say what lies off the device, and where."""
BESIDE = ("steps_per_print", "wall_clock_breakdown", "aio")
"""Keys that say what is printed, and how drives are read."""
WHERE = (
    "stage",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "offload_optimizer",
    "offload_param",
    "sub_group_size",
    "round_robin_gradients",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
)
"""Keys of ``zero_optimization`` that say where numbers lie, and in which portions they are moved."""


def is_on_nvme(config: Mapping[str, Any] | None) -> bool:
    """Whether a ds_config.json puts states or parameters on a drive."""
    zero = (config or {}).get("zero_optimization", {})
    sections = [zero.get(name) for name in OFFLOADED]
    return any(isinstance(section, Mapping) and section.get("device") == "nvme" for section in sections)


def learnt_of(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a ds_config.json says that may change what is learnt: all but what is known to leave it alone.

    The numbers that follow from the recipe leave it alone too: with others the file is refused.
    """
    rest = {key: value for key, value in (config or {}).items() if key not in (*NUMBERS, *BESIDE)}
    zero = rest.pop("zero_optimization", {})
    zero = {key: value for key, value in zero.items() if key not in WHERE}
    return rest | ({"zero_optimization": zero} if zero else {})


def _number_rule(key: str, ours: str) -> Rule:
    def differs(s: Setting) -> bool:
        number = getattr(s, ours) if hasattr(s, ours) else getattr(s.fields, ours)
        return read_config(s).get(key, AUTO) not in (AUTO, number)

    return Rule(
        f"deepspeed-config-{key.replace('_', '-')}",
        "deepspeed_config",
        differs,
        f"{key} {{{ours}}} in {{deepspeed_config}}, which follows from the recipe, or {AUTO!r}",
        "another one",
        f"Write {key}: {AUTO!r} in the file.",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "zero-stage",
        "zero_stage",
        lambda s: s.fields.zero_stage not in (1, 2, 3),
        "1, 2 or 3",
        "{zero_stage}",
        "Choose one of these.",
    ),
    Rule(
        "deepspeed-missing",
        "strategy",
        lambda s: s.strategy == "deepspeed" and find_spec("deepspeed") is None,
        "the package deepspeed",
        "an environment without it",
        "Install it with `pip install compresskit[deepspeed]`, or use strategy fsdp.",
    ),
    Rule(
        "deepspeed-config-without-deepspeed",
        "deepspeed_config",
        lambda s: s.fields.deepspeed_config is not None and s.strategy != "deepspeed",
        "strategy deepspeed beside deepspeed_config",
        "strategy {strategy}",
        "Set strategy to deepspeed, or drop deepspeed_config.",
    ),
    Rule(
        "deepspeed-config-unreadable",
        "deepspeed_config",
        lambda s: (
            s.fields.deepspeed_config is not None
            and s.strategy == "deepspeed"
            and config_at(s.fields.deepspeed_config) is None
        ),
        f"a JSON object in {{deepspeed_config}}, whose {', '.join(SECTIONS)} are objects too",
        "no such file, or something else in it",
        "Correct the path or the file.",
    ),
    Rule(
        "deepspeed-config-stage",
        "zero_stage",
        _config_stage,
        "the ZeRO stage that {deepspeed_config} names",
        "zero_stage={zero_stage}",
        "Make the two agree, or take the stage out of the file.",
    ),
    Rule(
        "deepspeed-config-optimizer",
        "deepspeed_config",
        lambda s: bool({"optimizer", "scheduler"} & set(read_config(s))),
        "no optimizer or scheduler in {deepspeed_config}",
        "one there, beside the recipe's own",
        "Take it out of the file: optimizer, learning_rate and lr_schedule of the recipe are used on every "
        "engine.",
    ),
    *(_number_rule(key, ours) for key, ours in NUMBERS.items()),
    Rule(
        "deepspeed-config-zenflow",
        "deepspeed_config",
        lambda s: "zenflow" in read_config(s).get("zero_optimization", {}),
        "no zenflow section in {deepspeed_config}: by itself it garbles weights and checkpoints",
        "one there",
        "Take it out of the file and set synchronise: zenflow, which mends that.",
    ),
    Rule(
        "deepspeed-config-precision",
        "deepspeed_config",
        lambda s: any(
            read_config(s).get(kind, {}).get("enabled") not in (None, False, "auto")
            for kind in ("bf16", "fp16")
        ),
        "no bf16 or fp16 section enabled in {deepspeed_config}",
        "one there, beside the recipe's precision",
        "Take it out of the file and set precision in the recipe: weights are kept in fp32 on every engine.",
    ),
)
