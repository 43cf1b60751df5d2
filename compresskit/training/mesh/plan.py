"""Which layers of a model can be split among ranks that compute together, and how. No torch.

Paper: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, https://arxiv.org/abs/1909.08053.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compresskit.errors import Fault

if TYPE_CHECKING:
    from compresskit.modeling.anatomy import Anatomy

OUTPUTS = ("colwise", "colwise_rep", "colwise_gather_output")
"""Each rank computes some outputs of the layer; all but the first gather them."""
INPUTS = ("rowwise", "rowwise_rep", "rowwise_split_input")
"""Each rank computes with some inputs of the layer, and all add up; all but the first divide them."""
PARTLY_SEEN = "replicated_with_grad_allreduce"
"""Each rank has the whole parameter and uses it on its own part of the activations."""
EMBEDDING = "embedding_rowwise"
"""Each rank could have some ids of an embedding, as some versions of transformers plan; here it has all."""
STYLES = (*OUTPUTS, *INPUTS, PARTLY_SEEN)
HEADS = "attention whose heads are all in each process"
"""What a loss needs that compares what attention is given."""
ELSE = "Use strategy fsdp without tensor_parallel, which divides any model."
NUMBER = re.compile(r"\.\d+(?=\.|$)")


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _plan(config: Any) -> Mapping[str, str]:
    """Names in the base model, ``*`` for a number -> how transformers would split them."""
    plan: Mapping[str, str] = getattr(text_config(config), "base_model_tp_plan", None) or {}
    return {name: style for name, style in plan.items() if style != EMBEDDING}


def styles(config: Any, names: Iterable[str]) -> Mapping[str, str]:
    """How transformers splits the modules called ``names``; those that it does not split are left out.

    Args:
        config: of a model of transformers; its plan is written from the base model on, ``*`` for a number.
        names: of modules, from the whole model on.
    """
    plan = _plan(config)
    found = {}
    for name in names:
        parts = NUMBER.sub(".*", name).split(".")
        for start in range(len(parts)):
            if style := plan.get(".".join(parts[start:])):
                found[name] = style
                break
    return found


def tensor_faults(config: Any, anatomy: Anatomy, ways: int, where: str) -> list[Fault]:
    """Why such a model cannot be split ``ways`` ways.

    Args:
        config: of the model.
        anatomy: of the model.
        ways: ranks that share each layer.
        where: prefix of each fault.
    """
    plan = _plan(config)
    split = styles(config, anatomy.linears)
    place = f"{where}.tensor_parallel"
    if not split or any(anatomy.linears[name].transposed for name in split):
        expected = "a model for which transformers has a plan of how layers are split"
        return [Fault(place, expected, type(config).__name__, ELSE)]
    unknown = sorted({f"{style} ({name})" for name, style in plan.items() if style not in STYLES})
    faults = [Fault(place, f"layers split as {', '.join(STYLES)}", one, ELSE) for one in unknown]
    return faults + _uneven(config, plan, ways, place) + _unequal(anatomy, split, ways, place)


def _uneven(config: Any, plan: Mapping[str, str], ways: int, place: str) -> list[Fault]:
    """Heads of attention lie on one rank each."""
    if not any(style == OUTPUTS[0] and "att" in name for name, style in plan.items()):
        return []
    text = text_config(config)
    counts = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    return [
        Fault(place, f"a divisor of {name}={count}", str(ways), f"Lower tensor_parallel. {ELSE}")
        for name, count in counts.items()
        if isinstance(count, int) and count % ways
    ]


def _unequal(anatomy: Anatomy, split: Mapping[str, str], ways: int, place: str) -> list[Fault]:
    widths: dict[tuple[str, int], str] = {}
    for name, style in split.items():
        linear = anatomy.linears[name]
        side = "out_features" if style in OUTPUTS else "in_features"
        if getattr(linear, side) % ways:
            widths.setdefault((side, getattr(linear, side)), name)
    return [
        Fault(place, f"a divisor of {side}={width} of {name}", str(ways), f"Lower tensor_parallel. {ELSE}")
        for (side, width), name in widths.items()
    ]
