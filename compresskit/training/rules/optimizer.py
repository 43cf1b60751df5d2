"""What does not combine: optimisers and learning rates. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from compresskit.training.fields import TrainingFields
from compresskit.training.optimizers import OPTIMIZERS, Known
from compresskit.training.rules.base import Rule
from compresskit.training.setting import Setting

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
SCALINGS = ("none", "linear", "sqrt")
PACKAGES = {known.package: known.install for known in OPTIMIZERS.values() if known.package}
ANYWHERE = Known("")
EPOCHS = TrainingFields().epochs


def _known(s: Setting) -> Known:
    """What is known of the optimiser; of a name that is none, nothing that a rule forbids."""
    return OPTIMIZERS.get(s.fields.optimizer, ANYWHERE)


def _picks(s: Setting) -> bool:
    """Whether it steps the matrices of blocks otherwise than the rest."""
    return s.fields.optimizer == "muon" or bool(_known(s).low_rank)


def _missing(package: str, install: str) -> Rule:
    return Rule(
        f"optimizer-{package.replace('_', '-')}-missing",
        "optimizer",
        lambda s: _known(s).package == package and find_spec(package) is None,
        f"the package {package} for optimizer {{optimizer}}",
        "an environment without it",
        f"Install it with `{install}`, or use optimizer adamw_torch.",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "optimizer-name",
        "optimizer",
        lambda s: s.fields.optimizer not in OPTIMIZERS,
        f"one of {', '.join(OPTIMIZERS)}",
        "{optimizer!r}",
        "Choose one of these.",
    ),
    Rule(
        "schedule-name",
        "lr_schedule",
        lambda s: s.fields.lr_schedule not in SCHEDULES,
        f"one of {', '.join(SCHEDULES)}",
        "{lr_schedule!r}",
        "Choose one of these.",
    ),
    Rule(
        "epochs-beside-steps",
        "epochs",
        lambda s: s.fields.steps is not None and s.fields.epochs != EPOCHS,
        "epochs left out beside steps={steps}, which say how long it trains",
        "{epochs}",
        "Give one of them.",
    ),
    Rule(
        "scaling-name",
        "learning_rate_scaling",
        lambda s: s.fields.learning_rate_scaling not in SCALINGS,
        ", ".join(SCALINGS),
        "{learning_rate_scaling!r}",
        "Choose one of these.",
    ),
    Rule(
        "scaling-without-reference",
        "reference_batch_size",
        lambda s: s.fields.learning_rate_scaling in SCALINGS[1:] and s.fields.reference_batch_size is None,
        "the batch size that learning_rate was found for, to scale it from",
        "none",
        "Set reference_batch_size, or leave learning_rate_scaling out.",
    ),
    Rule(
        "reference-without-scaling",
        "learning_rate_scaling",
        lambda s: s.fields.learning_rate_scaling == "none" and s.fields.reference_batch_size is not None,
        "linear or sqrt beside reference_batch_size",
        "none",
        "Set learning_rate_scaling, or leave reference_batch_size out.",
    ),
    *(_missing(*package) for package in PACKAGES.items()),
    Rule(
        "optimizer-engine",
        "optimizer",
        lambda s: s.strategy not in _known(s).engines and s.strategy in ("fsdp", "tp", "deepspeed"),
        "adamw_torch with strategy {strategy}, which shards the states of optimisers",
        "{optimizer}, whose states it cannot shard",
        "Use optimizer adamw_torch, or strategy ddp.",
    ),
    Rule(
        "optimizer-mesh",
        "optimizer",
        lambda s: s.on_mesh and _picks(s),
        "an optimizer that steps all weights alike beside replicas or tensor_parallel",
        "{optimizer}, which looks for matrices before they are divided",
        "Use optimizer adamw_torch, or strategy fsdp without replicas and tensor_parallel.",
    ),
    Rule(
        "optimizer-pipeline",
        "optimizer",
        lambda s: s.fields.pipeline_stages > 1 and (_picks(s) or _known(s).constant_rate),
        "an optimizer that steps all weights alike, and averages none, beside pipeline_stages",
        "{optimizer}",
        "Use optimizer adamw_torch, or pipeline_stages 1.",
    ),
    Rule(
        "optimizer-alone",
        "optimizer",
        lambda s: s.fields.synchronise != "every_step" and _known(s).constant_rate,
        "an optimizer that averages no weights beside synchronise {synchronise}, which averages them itself",
        "{optimizer}",
        "Use optimizer adamw_torch, or synchronise every_step.",
    ),
    Rule(
        "optimizer-paged-cpu",
        "optimizer",
        lambda s: _known(s).on_gpu and s.device == "cpu",
        "a GPU for optimizer {optimizer}",
        "a CPU",
        "Use optimizer adamw_torch.",
    ),
    Rule(
        "optimizer-schedule",
        "lr_schedule",
        lambda s: _known(s).constant_rate and s.fields.lr_schedule != "constant",
        "constant beside optimizer {optimizer}, which averages weights in place of lowering the rate",
        "{lr_schedule}",
        "Set lr_schedule to constant, or use optimizer adamw_torch.",
    ),
)
