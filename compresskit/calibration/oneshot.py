"""What one-shot stages share: layers, calibration rows, the memory both take. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compresskit.errors import Fault, ModelError

if TYPE_CHECKING:
    from compresskit.data.pack import TokenRows
    from compresskit.data.spec import DataSpec
    from compresskit.modeling.anatomy import Anatomy, Linear
    from compresskit.modeling.source import ModelSource

BATCH_TOKENS = 1024  # run through a block at once
MAX_CONTEXT = 2048
SPILL_BYTES = 1 << 26
PROBED_BYTES = 1 << 29
"""Of the log-probabilities, and what is made of them, while sensitivity is measured."""


class Calibrated(Protocol):
    """The fields of a stage that say what to calibrate on."""

    @property
    def data(self) -> DataSpec | None:
        """Text of the stage's own; None takes the recipe's."""
        ...

    @property
    def samples(self) -> int:
        """Rows."""
        ...

    @property
    def context_length(self) -> int | None:
        """Tokens per row; None is the model's own maximum, 2048 at most."""
        ...


def as_names(value: Sequence[str]) -> tuple[str, ...]:
    """One name or many, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def number_faults(stage: Calibrated, where: str) -> list[Fault]:
    """What is wrong with ``samples`` and ``context_length``, whatever the model."""
    return [
        Fault(f"{where}.{name}", "at least 1", str(value), f"Raise {name}.")
        for name, value in (("samples", stage.samples), ("context_length", stage.context_length))
        if value is not None and value < 1
    ]


def length_faults(stage: Calibrated, config: Any, where: str) -> list[Fault]:
    """What is wrong with the length of a row for a model of ``config``; only for methods that read rows."""
    from compresskit.modeling import context_length

    name = f"{where}.context_length"
    try:
        limit = context_length(config)
    except ModelError:
        if stage.context_length is not None:
            return []
        got = "none, and the model's config.json states no maximum"
        return [Fault(name, "the tokens of a calibration row", got, "Set context_length.")]
    if (stage.context_length or 0) <= limit:
        return []
    expected, got = f"at most {limit}, the model's own maximum", str(stage.context_length)
    return [Fault(name, expected, got, "Lower context_length.")]


def row_length(stage: Calibrated, config: Any) -> int:
    """Tokens per calibration row; ``stage`` has no faults."""
    from compresskit.modeling import context_length

    return stage.context_length or min(context_length(config), MAX_CONTEXT)


def calibration_rows(
    stage: Calibrated, model: ModelSource, fallback: DataSpec, *, cache: Path, scratch: Path
) -> tuple[TokenRows, Path | None, tuple[str, ...]]:
    """The rows a method sees.

    Args:
        stage: has no faults for ``model``.
        model: whose tokenizer is used.
        fallback: the text, where the stage names none.
        cache: of tokens.
        scratch: of this stage.

    Returns:
        The rows; a file for hidden states, where they are too many for memory; warnings.

    Raises:
        DataError: the text cannot be read.
        ModelError: the model has no tokenizer.
    """
    from compresskit.data.pack import packed
    from compresskit.modeling import load_tokenizer

    spec, length = stage.data or fallback, row_length(stage, model.config)
    tokenizer = load_tokenizer(model)
    rows = packed(spec, tokenizer, context_length=length, cache=cache, rows=stage.samples)
    warnings = list(rows.warnings)
    if len(rows) < stage.samples:
        warnings.append(
            f"Calibration asked for {stage.samples} rows of {length} tokens; {spec.source} holds {len(rows)}."
        )
    kept = _kept_bytes(len(rows) * rows.context_length, model.config, model.anatomy)
    return rows, scratch / "hidden.bin" if kept > SPILL_BYTES else None, tuple(warnings)


def walk_bytes(anatomy: Anatomy, weight_bytes: float) -> float:
    """Memory of a walk without data: one block and a new weight, or the token embedding or the head."""
    shapes = anatomy.parameter_shapes
    tables = {f"{name}.weight" for name in (anatomy.embeddings, anatomy.head)}
    again = {name for group in anatomy.tied for name in group[1:]}
    sizes: dict[str | None, int] = {}
    for name, shape in shapes.items():
        if name not in tables | again:
            block = anatomy.block_of(name)
            sizes[block] = sizes.get(block, 0) + prod(shape)
    outside = sizes.pop(None, 0)
    table = max((prod(shapes[name]) for name in tables & shapes.keys()), default=0)
    largest = max(sizes.values(), default=0) + largest_layer(anatomy, list(anatomy.linears))
    return (outside + max(table, largest)) * weight_bytes


def calibration_bytes(stage: Calibrated, config: Any, anatomy: Anatomy) -> int:
    """Memory that data adds to a walk: what is kept between runs, and one batch's values inside a block."""
    length = row_length(stage, config)
    batch = max(length, min(BATCH_TOKENS, stage.samples * length))
    inner = max((linear.out_features for linear in anatomy.linears.values() if linear.block), default=0)
    kept = _kept_bytes(stage.samples * length, config, anatomy)
    return min(kept, SPILL_BYTES) + batch * (8 * _width(config) + 4 * inner) * 4


def gram_bytes(anatomy: Anatomy, layers: Sequence[str]) -> int:
    """The Gram matrices of a block's ``layers`` that are alive together, and the factor of one."""
    blocks: dict[str | None, set[int]] = {}
    for layer in layers:
        linear = anatomy.linears[layer]
        blocks.setdefault(linear.block, set()).add(linear.in_features)
    widest = max((max(widths) for widths in blocks.values()), default=0)
    return 4 * (max((sum(w**2 for w in widths) for widths in blocks.values()), default=0) + widest**2)


def spilled_bytes(stage: Calibrated, config: Any, anatomy: Anatomy) -> int:
    """Disk that data takes during a walk: what is kept between runs, where it is too much for memory."""
    kept = _kept_bytes(stage.samples * row_length(stage, config), config, anatomy)
    return kept if kept > SPILL_BYTES else 0


def probe_bytes(anatomy: Anatomy, weight_bytes: float) -> float:
    """Memory of measuring what changing layers costs: the whole model, and what it said."""
    return anatomy.num_parameters * weight_bytes + PROBED_BYTES


def refine_bytes(stage: Calibrated, config: Any, anatomy: Anatomy, layers: Sequence[str]) -> tuple[int, int]:
    """Memory and disk that retraining component after component adds to a walk over ``layers``."""
    from compresskit.calibration.refine import components

    sizes = {name: linear.out_features * linear.in_features for name, linear in anatomy.linears.items()}
    largest, wide, width = 0, 0, _width(config)
    for block in anatomy.blocks:
        inside = components(block, [name for name in layers if anatomy.linears[name].block == block])
        largest = max(largest, *(sum(sizes[name] for name in of) for of in inside.values()), 0)
        # A component that is a layer gives what the layer does, any other what goes on to the next block.
        gives = (anatomy.linears[n].out_features if n in anatomy.linears else width for n in inside)
        wide = max(wide, sum(gives))
    length = row_length(stage, config)
    batch = max(length, min(BATCH_TOKENS, stage.samples * length))
    inner = max((linear.out_features for linear in anatomy.linears.values() if linear.block), default=0)
    # Weights in float32, gradients, two moments; what a backward pass needs of a batch.
    memory = largest * 4 * 4 + batch * (8 * width + 6 * inner) * 4
    # The dense model's hidden states, what its components gave, and what reaches one, twice over.
    kept = stage.samples * length * (3 * width + wide) * 4
    return memory + min(kept, SPILL_BYTES), kept if kept > SPILL_BYTES else 0


def _kept_bytes(tokens: int, config: Any, anatomy: Anatomy) -> int:
    """Hidden states of ``tokens``, what attention's last layer and the next read, and the last of all."""
    inner = max((linear.in_features for linear in anatomy.linears.values() if linear.block), default=0)
    return tokens * (3 * _width(config) + inner) * 4


def _width(config: Any) -> int:
    return getattr(config.get_text_config(), "hidden_size", 0) or 0


def largest_layer(anatomy: Anatomy, layers: Sequence[str]) -> int:
    """Weights of the largest of ``layers``."""
    linears = anatomy.linears
    return max((linears[n].out_features * linears[n].in_features for n in layers), default=0)


def tied_faults(anatomy: Anatomy, layers: Sequence[str], where: str) -> list[Fault]:
    """One fault for each layer that shares its weight with another part of the model."""
    return [
        Fault(
            f"{where}.targets",
            "layers with weights of their own",
            f"{name}, which shares its weight with the token embedding",
            f"Add {name} to ignore.",
        )
        for name in layers
        if anatomy.linears[name].tied
    ]


def fit_faults(
    linears: Mapping[str, Linear],
    layers: Sequence[str],
    misfit: Callable[[Linear], str | None],
    *,
    where: str,
    cure: str,
    size: Callable[[Linear], object] = lambda linear: linear.in_features,
) -> list[Fault]:
    """One fault for all layers of one size that something does not fit in the same way.

    Args:
        linears: of the model.
        layers: names of those to look at.
        misfit: what would fit such a layer; nothing where it fits.
        where: the field that does not fit.
        cure: a sentence.
        size: what to say of such a layer.
    """
    found: dict[tuple[str, object], list[str]] = {}
    for name in layers:
        if expected := misfit(linears[name]):
            found.setdefault((expected, size(linears[name])), []).append(name)
    return [
        Fault(where, expected, f"{got} in {', '.join(names)}", cure)
        for (expected, got), names in found.items()
    ]
