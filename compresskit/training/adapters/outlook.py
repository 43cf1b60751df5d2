"""What can be told of an adapter before it is trained: its faults, its parameters, what is frozen below it.

Shapes: O = out_features, I = in_features, R = rank. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from compresskit.calibration.oneshot import fit_faults, tied_faults
from compresskit.errors import Fault, PlanError
from compresskit.training.outlook import LONGEST_ROW
from compresskit.training.trainable import BESIDE, LOW_RANK

if TYPE_CHECKING:
    from compresskit.modeling import ModelSource
    from compresskit.modeling.anatomy import Anatomy, Linear
    from compresskit.stage import Outlook

INSTALL = "Install it with `pip install 'compresskit[qlora]'`."


def package_faults(package: str, where: str) -> list[Fault]:
    """Of a package that is not here; ``where`` is the field that asks for it."""
    found = find_spec(package) is not None
    return [] if found else [Fault(where, f"the package {package}", "an environment without it", INSTALL)]


def size_faults(rank: int, alpha: float, dropout: float, where: str) -> list[Fault]:
    """What is wrong with the numbers themselves, whatever the model."""
    faults = []
    if not 0 <= dropout < 1:
        expected, cure = "at least 0 and less than 1", "Give a share, such as 0.05."
        faults.append(Fault(f"{where}.dropout", expected, str(dropout), cure))
    if rank < 1:
        faults.append(Fault(f"{where}.rank", "at least 1", str(rank), "Raise rank."))
    if not alpha > 0:
        faults.append(Fault(f"{where}.alpha", "a number above 0", str(alpha), "Raise alpha."))
    return faults


def rank_faults(rank: int, anatomy: Anatomy, layers: Sequence[str], where: str) -> list[Fault]:
    """One fault for all layers of one width whose weight has a smaller rank already."""

    def misfit(linear: Linear) -> str:
        least = min(linear.in_features, linear.out_features)
        return "" if rank <= least else f"in_features and out_features of at least the rank, {rank}"

    cure = "Lower rank, or add these layers to ignore."
    return fit_faults(anatomy.linears, layers, misfit, where=f"{where}.rank", cure=cure)


def layer_faults(anatomy: Anatomy, layers: Sequence[str], where: str) -> list[Fault]:
    """Layers that cannot be frozen and updated beside that."""
    linears, field = anatomy.linears, f"{where}.targets"
    faults = tied_faults(anatomy, layers, where)
    if not faults and anatomy.head in layers:
        # The loss is computed from the head's own weight, a block of tokens at a time: no adapter is seen.
        cure = f"Add {anatomy.head} to ignore."
        faults.append(Fault(field, "layers before the output projection", str(anatomy.head), cure))
    # Frozen, a layer is a plain one, whatever it was.
    if odd := [name for name in layers if not linears[name].is_plain and not linears[name].transposed]:
        expected = "layers that compute as torch.nn.Linear does"
        faults.append(Fault(field, expected, ", ".join(odd), "Add these layers to ignore."))
    return faults


def unmergeable_faults(adapter: str, finish: str, where: str) -> list[Fault]:
    """An adapter that no weight can take in can only stand beside the model."""
    if adapter in LOW_RANK or finish == BESIDE:
        return []
    got = f"finish {finish} of adapter {adapter}, which no weight can take in"
    return [Fault(f"{where}.finish", BESIDE, got, "Set finish to adapter, or use lora or dora.")]


def prefix_faults(rank: int, context_length: int | None, model: Outlook, where: str) -> list[Fault]:
    """A prefix of ``rank`` tokens takes positions, and is seen by tokens however far away."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or LONGEST_ROW
    row = context_length or min(limit, LONGEST_ROW)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    faults = []
    got = f"{rank} tokens of prefix and rows of {row}"
    if row + rank > limit:
        cure = f"Set context_length to {limit - rank} or less."
        faults.append(Fault(f"{where}.context_length", f"together at most {limit} positions", got, cure))
    if window and row + rank > window:
        cure = f"Set context_length to {window - rank} or less, or use another adapter."
        faults.append(Fault(f"{where}.context_length", f"together at most the window of {window}", got, cure))
    return faults


def require_live_rows(model: ModelSource, layers: Iterable[str]) -> None:
    """PlanError where a DoRA adapter stays beside rows of zeros: who loads it divides by the norm of each."""
    for layer in layers:
        dead = (~model.weight_OI(layer).any(dim=1)).nonzero().flatten().tolist()
        if dead:
            got = f"{len(dead)} rows of zeros, the first of them {dead[0]}"
            cure = "Use adapter lora, set finish to merge, or add this layer to ignore."
            raise PlanError(Fault(layer, "rows with a norm, which peft's DoRA divides by", got, cure))


def beside_notes(adapter: str, finish: str) -> tuple[str, ...]:
    """What to say in a plan of an adapter that stays beside the model."""
    if finish != BESIDE:
        return ()
    return (f"The model stays as it is; the {adapter} adapter stands beside it, in adapter/.",)


def beside_warnings(finish: str, *, holds: bool) -> tuple[str, ...]:
    """What a reader of the result should know of such an adapter on a model that ``holds`` zeros."""
    if finish != BESIDE or not holds:
        return ()
    return (
        "The adapter beside the model is dense: the model keeps its zeros, but with the adapter on it no "
        "weight that a LoRA adapter touches is zero as it runs. finish: merge keeps them.",
    )


def parts_of(anatomy: Anatomy) -> tuple[str, ...]:
    """The direct children of blocks that hold linear layers: attention and feed-forward network, usually."""
    found: dict[str, None] = {}
    for name, linear in anatomy.linears.items():
        if linear.block is not None:
            child = name.removeprefix(linear.block + ".").partition(".")[0]
            found[f"{linear.block}.{child}"] = None
    return tuple(found)


def trained_parameters(adapter: str, rank: int, anatomy: Anatomy, config: Any, layers: Iterable[str]) -> int:
    """How many parameters the adapter has; ``layers`` are those that LoRA and DoRA update."""
    text = config.get_text_config()
    width = int(text.hidden_size)
    if adapter == "prefix":
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or width // text.num_attention_heads
        return int(rank * 2 * text.num_hidden_layers * heads * head_width)
    if adapter == "bottleneck":
        return len(parts_of(anatomy)) * (2 * width * rank + rank + width)
    linears = [anatomy.linears[name] for name in layers]
    low = sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    return low + (sum(linear.out_features for linear in linears) if adapter == "dora" else 0)


def as_stored_layers(anatomy: Anatomy) -> tuple[str, ...]:
    """Linear layers that can be frozen in the type they are stored in: each computes as a plain one does.

    The output projection is none: losses read its weight themselves.
    """
    return tuple(
        name
        for name, linear in anatomy.linears.items()
        if (linear.is_plain or linear.transposed) and not linear.tied and name != anatomy.head
    )


def frozen_bytes(
    anatomy: Anatomy, weight_bytes: float, packed: Mapping[str, float] = MappingProxyType({})
) -> int:
    """Of a model whose parameters take no gradient, as it is held while an adapter trains.

    Args:
        anatomy: of the model.
        weight_bytes: of one stored parameter.
        packed: of one weight of each layer that is frozen in few bits.
    """
    total = 4.0 * anatomy.num_parameters
    for name in {*as_stored_layers(anatomy), *packed}:
        linear = anatomy.linears[name]
        each = packed.get(name, min(4.0, weight_bytes))
        total += (each - 4.0) * linear.out_features * linear.in_features
    return round(total)
