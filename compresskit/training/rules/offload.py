"""What does not combine: what DeepSpeed keeps off the device. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from compresskit.training.rules.base import Rule
from compresskit.training.rules.deepspeed import OFFLOADED, is_on_nvme, read_config
from compresskit.training.setting import Setting

OFFLOADS = ("none", "optimizer", "parameters")
DEVICES = ("cpu", "nvme")


def _offloads(s: Setting) -> bool:
    return s.fields.offload in OFFLOADS[1:]


def _to_nvme(s: Setting) -> bool:
    """Whether the recipe or a file has something written to a drive, by an engine that could."""
    named = _offloads(s) and s.fields.offload_device == "nvme"
    return s.strategy == "deepspeed" and (named or is_on_nvme(read_config(s)))


def _says_so_itself(s: Setting) -> bool:
    """Whether the user's ds_config.json has sections of its own."""
    return bool(set(OFFLOADED) & set(read_config(s).get("zero_optimization", {})))


def _writes_asynchronously() -> bool:
    """Whether DeepSpeed's asynchronous reads and writes can be built here."""
    if find_spec("deepspeed") is None:
        return True  # told by another rule
    from deepspeed.ops.aio import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


RULES: tuple[Rule, ...] = (
    Rule(
        "offload-name",
        "offload",
        lambda s: s.fields.offload not in OFFLOADS,
        "none, optimizer or parameters",
        "{offload!r}",
        "Choose one of these.",
    ),
    Rule(
        "offload-device-name",
        "offload_device",
        lambda s: s.fields.offload_device not in DEVICES,
        "cpu or nvme",
        "{offload_device!r}",
        "Choose one of these.",
    ),
    Rule(
        "offload-without-deepspeed",
        "offload",
        lambda s: _offloads(s) and s.strategy != "deepspeed",
        "strategy deepspeed beside offload",
        "strategy {strategy}",
        "Set strategy to deepspeed, or offload to none.",
    ),
    Rule(
        "offload-parameters-stage",
        "offload",
        lambda s: s.fields.offload == "parameters" and s.strategy == "deepspeed" and s.fields.zero_stage < 3,
        "zero_stage 3 for offload parameters, since lower stages keep parameters whole",
        "zero_stage {zero_stage}",
        "Set zero_stage to 3, or offload to optimizer.",
    ),
    Rule(
        "offload-config",
        "offload",
        lambda s: _offloads(s) and _says_so_itself(s),
        "offload in the recipe or in {deepspeed_config}",
        "both",
        "Take offload_optimizer and offload_param out of the file, or offload out of the recipe.",
    ),
    Rule(
        "offload-nothing",
        "offload_device",
        lambda s: s.fields.offload == "none" and s.fields.offload_device == "nvme",
        "something to offload to nvme",
        "offload none",
        "Set offload to optimizer or parameters, or leave offload_device out.",
    ),
    Rule(
        "offload-nvme-path",
        "nvme_path",
        lambda s: (s.fields.offload_device == "nvme") != (s.fields.nvme_path is not None) and _offloads(s),
        "nvme_path where offload_device is nvme, and only there",
        "offload_device {offload_device}, nvme_path {nvme_path}",
        "Give both, or neither.",
    ),
    Rule(
        "offload-nvme-stage",
        "offload_device",
        lambda s: _to_nvme(s) and s.fields.zero_stage < 3,
        "zero_stage 3 for offload_device nvme",
        "zero_stage {zero_stage}",
        "Set zero_stage to 3, or offload_device (in the file: device) to cpu.",
    ),
    Rule(
        "offload-nvme-cpu",
        "offload_device",
        lambda s: _to_nvme(s) and s.device == "cpu",
        "a GPU for offload_device nvme, whose memory it is meant to spare",
        "{device}",
        "Set offload_device (in the file: device) to cpu.",
    ),
    Rule(
        "offload-nvme-library",
        "offload_device",
        lambda s: _to_nvme(s) and s.device == "cuda" and not _writes_asynchronously(),
        "the library libaio with its headers, for offload_device nvme",
        "a machine where deepspeed.ops.aio cannot be built",
        "Install them (Debian: `apt install libaio-dev`), "
        "or set offload_device (in the file: device) to cpu.",
    ),
    Rule(
        "offload-nvme-zeros",
        "offload_device",
        lambda s: _to_nvme(s) and getattr(s.fields, "kind", "") == "sparse_train",
        "offload_device cpu in a stage that changes which weights are zero",
        "nvme, where weights between steps are out of reach",
        "Set offload_device (in the file: device) to cpu.",
    ),
)
