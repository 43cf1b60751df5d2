"""Get the engine that was asked for, or an error; never another one in silence.

Accelerate decides once per process, when its state is first made, what kind of distributed run this is, and
it leaves FSDP and DeepSpeed out when the device is a CPU: asked for FSDP it gives DDP, without a word. So on
a CPU the shared state is made here first and told the kind, before any Accelerator exists:

* FSDP2: the kind is set to ``MULTI_GPU``, the one Accelerate turns into ``FSDP`` when it sees an FSDP plugin;
  the device stays the CPU, and FSDP2 runs on gloo.
* DeepSpeed: the kind is set to ``DEEPSPEED``; ``DS_ACCELERATOR=cpu`` must be in the environment before
  deepspeed is imported, and ``ACCELERATE_USE_CPU`` must not be.

On a GPU nothing of the sort is needed, nor for a model that is divided by ``compresskit.training.mesh``:
Accelerate takes it as it is. Either way :func:`require_engine` looks at what is really running.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from compresskit.errors import EngineError, Fault
from compresskit.training.deepspeed import deepspeed_config
from compresskit.training.mesh.ranks import asked_name, mesh_name
from compresskit.training.overlap import bucket_arguments
from compresskit.training.setting import Setting

CONFIGURED = {"use_configured_state": True}


def claim(setting: Setting) -> dict[str, Any]:
    """Tell Accelerate what kind of run this is; call before TrainingArguments are made.

    Args:
        setting: of the run; ``device`` is where it will compute.

    Returns:
        What to pass as ``accelerator_config``.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if setting.on_mesh:
        for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"):
            os.environ.pop(f"ACCELERATE_USE_{name}", None)
        return {}
    if setting.device != "cpu" or setting.strategy not in ("fsdp", "deepspeed"):
        return {}
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if setting.strategy == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    kinds = {"fsdp": DistributedType.MULTI_GPU, "deepspeed": DistributedType.DEEPSPEED}
    PartialState._shared_state["distributed_type"] = kinds[setting.strategy]
    return dict(CONFIGURED)


def engine_arguments(setting: Setting, block_classes: list[str]) -> dict[str, Any]:
    """The part of TrainingArguments that chooses the engine.

    Args:
        setting: of the run.
        block_classes: class names of the repeated blocks, the units FSDP gathers.
    """
    if setting.strategy == "fsdp" and not setting.on_mesh:
        return {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": block_classes,
                "reshard_after_forward": True,
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    if setting.strategy == "deepspeed":
        return {"deepspeed": deepspeed_config(setting)}
    # Masks, frozen integers and scales are the same on all ranks already: DDP need not send them each step.
    return {"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False} | bucket_arguments(setting)


def require_engine(setting: Setting, wrapped: nn.Module, model: nn.Module) -> None:
    """Look at what Accelerate made of the model; EngineError unless it is what was asked for.

    Args:
        setting: what was asked for.
        wrapped: what training calls.
        model: the bare model.
    """
    found = running_engine(wrapped, model)
    asked = asked_name(setting) if setting.on_mesh else setting.strategy
    if asked == "deepspeed":
        asked = f"deepspeed ZeRO-{setting.fields.zero_stage}"
    if found != asked:
        raise EngineError(
            Fault("strategy", asked, found, "Choose another strategy, or another version of accelerate.")
        )


def running_engine(wrapped: nn.Module, model: nn.Module) -> str:
    """``single``, ``ddp``, ``fsdp``, ``fsdp 2 x tp 2`` or ``deepspeed ZeRO-1``, by what the objects are."""
    stage = getattr(wrapped, "zero_optimization_stage", None)
    if callable(stage):
        return f"deepspeed ZeRO-{stage()}"
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return "ddp"
    if found := mesh_name(model):
        return found
    sharded = [hasattr(p, "to_local") for p in model.parameters()]
    if all(sharded):
        return "fsdp"
    return "fsdp in part" if any(sharded) else "single"
