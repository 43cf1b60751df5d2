"""What can be told of feature losses before weights are read: faults and memory; and their part of a job.

For any stage with the fields ``teacher``, ``teacher_placement`` and ``features``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from compresskit.distill import FEATURE_LOSSES
from compresskit.distill.features import Compared, looks_of, output_pairs
from compresskit.distill.mapping import FeatureFields, mapping_faults, paired
from compresskit.distill.relation_outlook import relation_bytes, relation_faults
from compresskit.errors import Fault, InputError
from compresskit.modeling import ModelSource, open_model
from compresskit.options import Choice, choice_faults, choices_of, option_faults
from compresskit.training.job import Part
from compresskit.training.lesson import REPLICATE
from compresskit.training.mesh.plan import ELSE, HEADS
from compresskit.training.outlook import STATE_BYTES, pass_tokens

if TYPE_CHECKING:
    from compresskit.stage import Outlook
    from compresskit.training.lesson import Taught

FEATURED = "compresskit.distill.features:WithFeatures"
LAYERS, WEIGHT = "layers", "weight"


def features_of(stage: Taught) -> tuple[Choice, ...]:
    """The feature losses of ``stage``; none where it has none."""
    return () if stage.features is None else choices_of(stage.features)


def feature_faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with the feature losses of ``stage``, if it has any, for a student such as ``model``."""
    if stage.features is None:
        return []
    if not features_of(stage):
        cure = "Write squarehead, or leave features out."
        return [Fault(where, "at least one feature loss", "an empty list", cure)]
    faults = [fault for place, named in _placed(stage, where) for fault in _choice_faults(named, place)]
    try:
        teacher = teacher_of(stage, model)
    except InputError:
        return faults  # that there is no such teacher is told by itself
    faults += pair_faults(stage, model, teacher, where)
    if faults:
        return faults
    for (place, named), one in zip(_placed(stage, where), compared(stage, model, teacher), strict=True):
        if not one.attends:
            continue
        if stage.teacher_placement.method != REPLICATE:
            got, cure = stage.teacher_placement.method, "Leave teacher_placement out."
            faults.append(Fault(place, f"teacher_placement {REPLICATE} beside {named.method}", got, cure))
        ways = getattr(stage, "tensor_parallel", 1)  # every stage that is taught trains
        if ways > 1:
            faults.append(Fault(place, HEADS, f"tensor_parallel={ways}", ELSE))
        pairs = tuple((pair[0], pair[1]) for pair in one.pairs)
        faults += relation_faults(named, pairs, model, teacher, place)
    return faults


def feature_bytes(stage: Taught, model: Outlook) -> int:
    """Of what both models keep for feature losses, each block once, and of projections in training."""
    if stage.features is None:
        return 0
    fields_of: Any = stage  # every stage that is taught trains
    teacher = teacher_of(stage, model)
    features = compared(stage, model, teacher)
    relations = sum(
        len(one.pairs) * relation_bytes(named, fields_of, model)
        for named, one in zip(features_of(stage), features, strict=True)
        if one.attends
    )
    mine, theirs = (len(looks_of(features, side).outputs) for side in (0, 1))
    pairs, (student, taught) = len(output_pairs(features)), (width_of(model.config), width_of(teacher.config))
    projected = 0 if student == taught else taught
    numbers = mine * student + pairs * projected + theirs * taught
    states = 4 * numbers * pass_tokens(fields_of, model.config)
    return relations + states + pairs * student * projected * STATE_BYTES


def featured(stage: Taught, objective: Part, model: ModelSource, teacher: ModelSource) -> Part:
    """``objective``, and the feature losses of ``stage`` between ``model`` and ``teacher`` besides."""
    features = compared(stage, model, teacher)
    widths = width_of(model.config), width_of(teacher.config)
    projected = bool(output_pairs(features)) and widths[0] != widths[1]
    options = {"objective": asdict(objective), "features": tuple(map(asdict, features))}
    return Part(FEATURED, {**options, "widths": widths if projected else None})


def compared(stage: Taught, model: Outlook | ModelSource, teacher: ModelSource) -> tuple[Compared, ...]:
    """The feature losses of ``stage``, which have no faults, with the blocks that each compares."""
    counts = len(model.anatomy.blocks), len(teacher.anatomy.blocks)
    return tuple(
        Compared(
            method=named.method,
            options={name: value for name, value in named.options if name != LAYERS},
            pairs=paired(_layers(named), *counts),
        )
        for named in features_of(stage)
    )


def pair_faults(stage: Taught, model: Outlook | ModelSource, teacher: ModelSource, where: str) -> list[Fault]:
    """What is wrong with comparing blocks of ``model`` and of ``teacher`` as the feature losses ask."""
    if stage.features is None:
        return []
    expected = "a model of repeated blocks whose configuration has a hidden_size"
    faults = [
        Fault(where, f"{expected}, as {side}", type(side_of.config).__name__, "Leave features out.")
        for side, side_of in (("student", model), ("teacher", teacher))
        if not side_of.anatomy.blocks or not width_of(side_of.config)
    ]
    counts = len(model.anatomy.blocks), len(teacher.anatomy.blocks)
    return faults or [
        fault
        for place, named in _placed(stage, where)
        for fault in mapping_faults(_layers(named), *counts, f"{place}.{LAYERS}")
    ]


def teacher_of(stage: Taught, model: Outlook) -> ModelSource:
    """The teacher of ``stage``, opened, its weights unread.

    Raises:
        InputError: there is none.
    """
    return open_model(stage.teacher or str(model.original), trust_remote_code=model.trust_remote_code)


def width_of(config: Any) -> int:
    """Of the hidden states between blocks of a model with such a configuration; 0 where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", 0) or 0)


def _placed(stage: Taught, where: str) -> Iterator[tuple[str, Choice]]:
    """Each feature loss with its place in the recipe: of several ``features[1]``."""
    named = features_of(stage)
    for i, one in enumerate(named):
        yield (f"{where}[{i}]" if len(named) > 1 else where), one


def _choice_faults(named: Choice, where: str) -> list[Fault]:
    """What is wrong with its name and its own fields; its layers need both models."""
    others = tuple(option for option in named.options if option[0] != LAYERS)
    faults = choice_faults(Choice(named.method, others), FEATURE_LOSSES, where=where)
    if named.method not in FEATURE_LOSSES:  # what all of them have is checked all the same
        weight = tuple(option for option in others if option[0] == WEIGHT)
        faults += option_faults(FeatureFields, weight, where=where)
    return faults


def _layers(named: Choice) -> Any:
    """As the recipe wrote them, or what the method has by default."""
    own: Any = FEATURE_LOSSES.get(named.method, FeatureFields)
    default = next(f.default for f in fields(own) if f.name == LAYERS)
    return dict(named.options).get(LAYERS, default)
