"""The optimisers there are, by name: one table, from which rules, forecasts and making them follow. No torch.

Names are those of transformers' registry, and of torch's where that has none (``adam``, ``muon`` ...).
Optimisers that step inside the backward pass (``lomo``, ``*_layerwise``) are left out: gradients could be
neither clipped nor summed over passes.

Papers: Adafactor https://arxiv.org/abs/1804.04235, Lion https://arxiv.org/abs/2302.06675, 8-bit states
https://arxiv.org/abs/2110.02861, AdEMAMix https://arxiv.org/abs/2409.03137, GaLore
https://arxiv.org/abs/2403.03507, APOLLO https://arxiv.org/abs/2412.05270, Muon
https://arxiv.org/abs/2502.16982, schedule-free https://arxiv.org/abs/2405.15682, StableAdamW
https://arxiv.org/abs/2304.13013.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

CHANGED, HELD, MOVED = "changed", "held", "moved"
"""What becomes of zeros: they may change from step to step, may be held from the start, or are moved."""
ALL = frozenset({"single", "ddp", "fsdp", "tp", "deepspeed"})
WHOLE, NATIVE = frozenset({"single", "ddp"}), frozenset({"single", "ddp", "fsdp", "tp"})


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to know of one optimiser.

    Attributes:
        source: ``module:Class``; a class called ``muon`` is made of two.
        options: fields of ``optimizer_options`` that it takes.
        fixed: arguments it is made with, whatever the options.
        preset: arguments it is made with unless the options say otherwise.
        on_cpu: arguments it is made with besides, for weights on a CPU.
        zeros: what becomes of weights that are zero and whose gradients are zero.
        engines: strategies it trains under, ``single`` among them.
        package: to import, where that is an extra.
        install: what to type where ``package`` is missing.
        on_gpu: whether it needs one.
        matrix_bytes: of optimiser state for a weight of a linear layer in a block.
        rest_bytes: of optimiser state for any other weight; None is the same.
        low_rank: whether options such as ``rank`` apply to linear layers in blocks alone.
        constant_rate: whether it does without a schedule of the learning rate, and averages weights instead.
        betas: how many there are.
    """

    source: str
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)
    on_cpu: Mapping[str, Any] = field(default_factory=dict)
    zeros: str = CHANGED
    engines: frozenset[str] = ALL
    package: str = ""
    install: str = ""
    on_gpu: bool = False
    matrix_bytes: float = 8
    rest_bytes: float | None = None
    low_rank: tuple[str, ...] = ()
    constant_rate: bool = False
    betas: int = 2

    def expected(self, option: str) -> Expected:
        """What the value of one of its options may be."""
        return _betas(self.betas) if option == "betas" else EXPECTED[option]


ADAM = ("betas", "eps")
FUSED = {"fused": True}
_BNB = Known(
    "bitsandbytes.optim:AdamW",
    ADAM,
    {"optim_bits": 32},
    engines=WHOLE,
    package="bitsandbytes",
    install="pip install 'compresskit[qlora]'",
)
_BNB_8 = replace(_BNB, fixed={"optim_bits": 8}, zeros=MOVED, matrix_bytes=2, rest_bytes=8)
_LION = replace(_BNB, source="bitsandbytes.optim:Lion", options=("betas",), matrix_bytes=4)
_MIX = replace(
    _BNB,
    source="bitsandbytes.optim:AdEMAMix",
    options=(*ADAM, "alpha", "t_alpha", "t_beta3"),
    zeros=HELD,
    matrix_bytes=12,
    betas=3,
)
_RMS = replace(_BNB, source="bitsandbytes.optim:RMSprop", options=("alpha", "eps"), matrix_bytes=4)
_AO = Known(
    "torchao.optim:AdamW8bit",
    (*ADAM, "block_size"),
    zeros=HELD,
    engines=NATIVE,
    package="torchao",
    install="pip install 'compresskit[qat]'",
    matrix_bytes=2.1,
)
_FREE = Known(
    "schedulefree:AdamWScheduleFree",
    (*ADAM, "r", "weight_lr_power"),
    zeros=HELD,
    engines=WHOLE,
    package="schedulefree",
    install="pip install schedulefree",
    constant_rate=True,
)
_GALORE = Known(
    "galore_torch:GaLoreAdamW",
    (*ADAM, "rank", "update_proj_gap", "scale", "proj_type"),
    {"no_deprecation_warning": True},
    {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    zeros=MOVED,
    engines=WHOLE,
    package="galore_torch",
    install="pip install galore-torch",
    matrix_bytes=4,
    rest_bytes=8,
    low_rank=("rank", "update_proj_gap", "scale", "proj_type"),
)
_APOLLO = replace(
    _GALORE,
    source="apollo_torch:APOLLOAdamW",
    options=(*_GALORE.options, "proj", "scale_type"),
    preset={**_GALORE.preset, "scale": 1.0, "proj": "random", "scale_type": "channel"},
    zeros=HELD,
    package="apollo_torch",
    install="pip install apollo-torch",
    low_rank=(*_GALORE.low_rank, "proj", "scale_type"),
)


def _paged(known: Known) -> Known:
    return replace(known, fixed={**known.fixed, "is_paged": True}, on_gpu=True)


def _bits8(known: Known, state_bytes: float) -> Known:
    return replace(known, fixed={"optim_bits": 8}, zeros=MOVED, matrix_bytes=state_bytes, rest_bytes=8)


OPTIMIZERS: Mapping[str, Known] = {
    # Not fused, a step on a CPU takes ten times as long.
    "adamw_torch": Known("torch.optim:AdamW", (*ADAM, "amsgrad"), FUSED),
    "adamw_torch_fused": Known("torch.optim:AdamW", (*ADAM, "amsgrad"), FUSED),
    "adam": Known("torch.optim:Adam", (*ADAM, "amsgrad"), FUSED),
    "nadam": Known("torch.optim:NAdam", (*ADAM, "momentum_decay"), {"decoupled_weight_decay": True}),
    "radam": Known("torch.optim:RAdam", ADAM, {"decoupled_weight_decay": True}),
    "adamax": Known("torch.optim:Adamax", ADAM),
    "adadelta": Known("torch.optim:Adadelta", ("rho", "eps")),
    "sgd": Known("torch.optim:SGD", ("momentum", "dampening", "nesterov"), matrix_bytes=4),
    # DeepSpeed rebuilds an Adagrad in a way that its own ZeRO cannot step.
    "adagrad": Known("torch.optim:Adagrad", ("lr_decay", "eps"), engines=NATIVE, matrix_bytes=4),
    "rmsprop": Known("torch.optim:RMSprop", ("alpha", "eps", "momentum", "centered"), matrix_bytes=4),
    "adafactor": Known(
        "transformers.optimization:Adafactor",
        ("clip_threshold", "decay_rate", "beta1"),
        {"scale_parameter": False, "relative_step": False},
        engines=ALL - {"fsdp", "tp"},
        matrix_bytes=0.1,
    ),
    "muon": Known(
        "compresskit.training.muon:MuonAdamW",
        (*ADAM, "momentum", "nesterov", "ns_steps", "adjust_lr_fn"),
        preset={"adjust_lr_fn": "match_rms_adamw"},
        zeros=MOVED,
        engines=NATIVE,
        matrix_bytes=4,
        rest_bytes=8,
    ),
    "lion": _LION,
    "lion_32bit": _LION,
    "lion_8bit": _bits8(_LION, 1),
    "paged_lion_32bit": _paged(_LION),
    "paged_lion_8bit": _paged(_bits8(_LION, 1)),
    "adamw_8bit": _BNB_8,
    "adamw_bnb_8bit": _BNB_8,
    "paged_adamw_32bit": _paged(_BNB),
    "paged_adamw_8bit": _paged(_BNB_8),
    "ademamix": _MIX,
    "ademamix_8bit": _bits8(_MIX, 3),
    "paged_ademamix_32bit": _paged(_MIX),
    "paged_ademamix_8bit": _paged(_bits8(_MIX, 3)),
    "rmsprop_bnb": _RMS,
    "rmsprop_bnb_32bit": _RMS,
    "rmsprop_bnb_8bit": replace(_bits8(_RMS, 1), zeros=HELD),
    "adamw_torch_8bit": _AO,
    "adamw_torch_4bit": replace(
        _AO, source="torchao.optim:AdamW4bit", preset={"block_size": 128}, engines=WHOLE, matrix_bytes=1.1
    ),
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": replace(
        _GALORE, source="galore_torch:GaLoreAdamW8bit", fixed={}, on_gpu=True, matrix_bytes=2
    ),
    "galore_adafactor": replace(
        _GALORE,
        source="galore_torch:GaLoreAdafactor",
        options=_GALORE.low_rank,
        fixed={"scale_parameter": False, "relative_step": False},
        matrix_bytes=2,
    ),
    "apollo_adamw": _APOLLO,
    "schedule_free_adamw": _FREE,
    "schedule_free_radam": replace(_FREE, source="schedulefree:RAdamScheduleFree"),
    "schedule_free_sgd": replace(
        _FREE, source="schedulefree:SGDScheduleFree", options=("momentum", "r", "weight_lr_power")
    ),
    "stable_adamw": Known(
        "optimi:StableAdamW",
        ADAM,
        on_cpu={"triton": False},  # it would take a kernel for GPUs wherever triton can be imported
        engines=WHOLE,
        package="optimi",
        install="pip install torch-optimi",
    ),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What the value of an option may be: in words, and as a question."""

    words: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _share(value: Any) -> bool:
    return bool(_number(value) and 0 <= value < 1)


def _betas(count: int) -> Expected:
    def fits(value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) == count and all(map(_share, value))

    return Expected(f"{('two', 'three')[count - 2]} numbers from 0 to below 1", fits)


def _one_of(*names: str) -> Expected:
    return Expected(" or ".join(names), lambda value: value in names)


_POSITIVE = Expected("a number above 0", lambda v: _number(v) and v > 0)
_ANY = Expected("a number of 0 or more", lambda v: _number(v) and v >= 0)
_SHARE = Expected("a number from 0 to below 1", _share)
_SWITCH = Expected("true or false", lambda v: isinstance(v, bool))
_WHOLE = Expected("a whole number of 1 or more", _count)
EXPECTED: Mapping[str, Expected] = {
    "eps": _POSITIVE,
    "amsgrad": _SWITCH,
    "momentum_decay": _ANY,
    "rho": _SHARE,
    "momentum": _SHARE,
    "dampening": _ANY,
    "nesterov": _SWITCH,
    "lr_decay": _ANY,
    "alpha": _ANY,
    "centered": _SWITCH,
    "clip_threshold": _POSITIVE,
    "decay_rate": Expected("a number below 0", lambda v: _number(v) and v < 0),
    "beta1": _SHARE,
    "ns_steps": _WHOLE,
    "adjust_lr_fn": _one_of("original", "match_rms_adamw"),
    "t_alpha": _WHOLE,
    "t_beta3": _WHOLE,
    "block_size": _WHOLE,
    "rank": _WHOLE,
    "update_proj_gap": _WHOLE,
    "scale": _POSITIVE,
    "proj_type": _one_of("std", "reverse_std", "right", "left", "full"),
    "proj": _one_of("random", "svd"),
    "scale_type": _one_of("channel", "tensor"),
    "r": _ANY,
    "weight_lr_power": _ANY,
}
