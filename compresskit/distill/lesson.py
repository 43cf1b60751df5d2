"""What a stage learns from a teacher: checks of its fields, and the parts of a training job.

For any stage with the fields ``teacher``, ``loss``, ``temperature``, ``cross_entropy_weight``, ``features``.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from math import inf
from typing import TYPE_CHECKING, Any

from compresskit.distill import FEATURE_LOSSES, LOSSES
from compresskit.distill.align.checks import aligned, alignment_faults, spelt_ids
from compresskit.distill.mapping import FeatureFields, Pairs, mapping_faults, paired
from compresskit.distill.placements import PLACEMENTS
from compresskit.distill.placements.base import Placement, Preparatory, Teaching
from compresskit.distill.relation_outlook import relation_bytes, relation_faults
from compresskit.distill.vocabulary import (
    shared_vocabulary,
    teacher_faults,
    vocabulary_faults,
    vocabulary_of,
)
from compresskit.errors import Fault, InputError, PlanError
from compresskit.modeling import ModelSource, open_model
from compresskit.options import Choice, choice_faults, choices_of, option_faults
from compresskit.progress import size
from compresskit.training.features import ATTENTION, OUTPUT
from compresskit.training.job import Part
from compresskit.training.lesson import NO_ALIGNMENT, REPLICATE, SERVER, TEXT_ALONE, unused_faults
from compresskit.training.outlook import STATE_BYTES, pass_tokens, scale_faults
from compresskit.training.stage import CROSS_ENTROPY

if TYPE_CHECKING:
    from compresskit.data.spec import DataSpec
    from compresskit.stage import Outlook, StageContext
    from compresskit.training.lesson import Taught

DIVERGENCES = "compresskit.distill.divergences:Divergences"
FEATURED = "compresskit.distill.features:WithFeatures"
LAYERS, WEIGHT = "layers", "weight"


class TeachersLesson:
    """See :class:`compresskit.training.lesson.Lesson`."""

    @staticmethod
    def faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
        """What is wrong with the losses, the teacher and its vocabulary, for a student such as ``model``."""
        faults = []
        if stage.loss == TEXT_ALONE and stage.features is not None:
            faults += unused_faults(stage, where, "temperature", "cross_entropy_weight")
        else:
            faults += loss_faults(stage, f"{where}.loss")
        faults += mix_faults(stage, where)
        faults += feature_faults(stage, model, f"{where}.features")
        faults += alignment_faults(stage, where)
        faults += teacher_faults(
            stage.teacher, stage.data or model.data, model, where, is_aligned=is_aligned(stage)
        )
        place = f"{where}.teacher_placement"
        faults += choice_faults(stage.teacher_placement, PLACEMENTS, where=place)
        if faults:
            return faults
        return _placement(stage).faults(stage, model, _foreseen(stage, model), place)

    @staticmethod
    def held_bytes(stage: Taught, model: Outlook) -> int:
        """Of what every process holds of the teacher, and of what a feature loss keeps."""
        teaching = _foreseen(stage, model)
        return _placement(stage).held_bytes(stage, model, teaching) + feature_bytes(stage, model)

    @staticmethod
    def notes(stage: Taught, model: Outlook) -> tuple[str, ...]:
        """What each placement would hold of the teacher in each process, and what is done before training."""
        teaching, placement = _foreseen(stage, model), _placement(stage)
        before = placement.notes(stage, model, teaching) if isinstance(placement, Preparatory) else ()
        return (held_note(stage.teacher_placement, stage, model, teaching), *before)

    @staticmethod
    def parts(stage: Taught, model: ModelSource, context: StageContext) -> tuple[Part, Part]:
        """What to minimise, and where the teacher's signal comes from.

        Raises:
            PlanError: the teacher's token ids are others, its logits are scaled, or blocks do not pair.
        """
        trust = context.trust_remote_code
        source = open_model(stage.teacher or str(context.original), trust_remote_code=trust)
        rows = vocabulary_of(model.config)
        faults = vocabulary_faults(
            model.directory, rows, source, "teacher", trust_remote_code=trust, is_aligned=is_aligned(stage)
        )
        faults += scale_faults(source.config, "teacher")
        faults += _pair_faults(stage.features, model, source, "features") if stage.features else []
        if faults:
            raise PlanError(*faults)
        objective = CROSS_ENTROPY if stage.loss == TEXT_ALONE else _loss(stage)
        placed = _placement(stage).part(_teaching(stage, model, source, context.data, trust))
        if stage.features is not None:
            objective = featured(stage.features, objective, model, source)
            if takes(stage.features) == ATTENTION:  # of a replica, as the plan made sure
                placed = Part(placed.target, {**placed.options, "takes": ATTENTION})
        return objective, aligned(stage, placed, model, source, trust) if is_aligned(stage) else placed


def is_aligned(stage: Taught) -> bool:
    """Whether the teacher has a tokenizer of its own."""
    named: Choice = stage.alignment
    return named.method != NO_ALIGNMENT


def featured(named: Choice, objective: Part, model: ModelSource, teacher: ModelSource) -> Part:
    """``objective``, and the feature loss ``named`` between ``model`` and ``teacher`` besides."""
    own = dict(named.options)
    own.pop(LAYERS, None)
    options: dict[str, Any] = {"objective": asdict(objective), "method": named.method, "options": own}
    widths = width_of(model.config), width_of(teacher.config)
    projected = takes(named) == OUTPUT and widths[0] != widths[1]
    options |= {"pairs": pairs_of(named, model, teacher), "widths": widths if projected else None}
    return Part(FEATURED, options)


def takes(named: Choice) -> str:
    """What the feature loss ``named`` compares of a block."""
    return FEATURE_LOSSES[named.method].takes


def held_note(chosen: Choice, stage: Taught, model: Outlook, teaching: Teaching) -> str:
    """What each placement would hold of the teacher, in a line; none that would save nothing."""
    if chosen.method == SERVER and stage.teacher is None:
        return "Teacher, in each process: nothing, it is behind a server."
    made = {name: _placement(stage) if name == chosen.method else _plain(name) for name in PLACEMENTS}
    held = {name: placement.held_bytes(stage, model, teaching) for name, placement in made.items()}
    told = []
    for name, count in held.items():
        if name in (REPLICATE, chosen.method) or count < held[REPLICATE]:
            mark = " (chosen)" if name == chosen.method else ""
            told.append(f"{name} {size(count) if count else 'nothing'}{mark}")
    return f"Teacher, in each process: {', '.join(told)}."


def _plain(name: str) -> Placement:
    """A placement for its bytes alone, which hang on no option that has to be given."""
    cls: Any = PLACEMENTS[name]
    needed = [f for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    made: Placement = cls(**{field.name: "" for field in needed})
    return made


def loss_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the losses of ``stage`` on next-token distributions."""
    choices = choices_of(stage.loss)
    if not choices:
        return [Fault(where, "at least one loss", "an empty list", "Write forward_kl, or leave loss out.")]
    place = "{}[{}]" if len(choices) > 1 else "{}"
    return [
        fault
        for i, choice in enumerate(choices)
        for fault in choice_faults(choice, LOSSES, where=place.format(where, i))
    ]


def mix_faults(stage: Taught, where: str) -> list[Fault]:
    """What is wrong with the temperature and the share of cross entropy."""
    faults = []
    if not 0 < stage.temperature < inf:
        got, cure = str(stage.temperature), "Set temperature to a number such as 2."
        faults.append(Fault(f"{where}.temperature", "a finite number above 0", got, cure))
    if not 0 <= stage.cross_entropy_weight <= 1:
        got, cure = str(stage.cross_entropy_weight), "Give the share of cross entropy, such as 0.5."
        faults.append(Fault(f"{where}.cross_entropy_weight", "a number from 0 to 1", got, cure))
    return faults


def feature_faults(stage: Taught, model: Outlook, where: str) -> list[Fault]:
    """What is wrong with the feature loss of ``stage``, if it has one, for a student such as ``model``."""
    if stage.features is None:
        return []
    named: Choice = stage.features
    others = tuple(option for option in named.options if option[0] != LAYERS)
    faults = choice_faults(Choice(named.method, others), FEATURE_LOSSES, where=where)
    if named.method not in FEATURE_LOSSES:  # what all of them have is checked all the same
        weight = tuple(option for option in others if option[0] == WEIGHT)
        faults += option_faults(FeatureFields, weight, where=where)
    try:
        teacher = _teacher(stage, model)
    except InputError:
        return faults  # that there is no such teacher is told by itself
    faults += _pair_faults(named, model, teacher, where)
    if faults or takes(named) == OUTPUT:
        return faults
    if stage.teacher_placement.method != REPLICATE:
        got, cure = stage.teacher_placement.method, "Leave teacher_placement out."
        faults.append(Fault(where, f"teacher_placement {REPLICATE} beside {named.method}", got, cure))
    return faults + relation_faults(named, pairs_of(named, model, teacher), model, teacher, where)


def feature_bytes(stage: Taught, model: Outlook) -> int:
    """Of the states that both models keep for a feature loss, and of projections in training."""
    if stage.features is None:
        return 0
    fields_of: Any = stage  # every stage that is taught trains
    teacher = _teacher(stage, model)
    pairs = len(pairs_of(stage.features, model, teacher))
    if takes(stage.features) == ATTENTION:
        return pairs * relation_bytes(stage.features, fields_of, model)
    student, taught = width_of(model.config), width_of(teacher.config)
    projected = 0 if student == taught else taught
    states = 4 * pairs * pass_tokens(fields_of, model.config) * (student + projected + taught)
    return states + pairs * student * projected * STATE_BYTES


def width_of(config: Any) -> int:
    """Of the hidden states between blocks of a model with such a configuration; 0 where it does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "hidden_size", 0) or 0)


def _placement(stage: Taught) -> Placement:
    placed: Choice = stage.teacher_placement
    made: Placement = PLACEMENTS[placed.method](**dict(placed.options))
    return made


def _foreseen(stage: Taught, model: Outlook) -> Teaching:
    """What the stage will ask of its teacher."""
    return _teaching(stage, model, _teacher(stage, model), model.data, model.trust_remote_code)


def _teaching(
    stage: Taught, model: Outlook | ModelSource, source: ModelSource, data: DataSpec, trust: bool
) -> Teaching:
    pairs = pairs_of(stage.features, model, source) if stage.features is not None else ()
    shared = shared_vocabulary(vocabulary_of(model.config), source)
    return Teaching(
        teacher=source,
        vocabulary=spelt_ids(source, trust) if is_aligned(stage) else shared,
        blocks=tuple(block for _, block in pairs),
        losses=() if stage.loss == TEXT_ALONE else choices_of(stage.loss),
        temperature=stage.temperature,
        trust_remote_code=trust,
        isolated=not (stage.data or data).cross_documents,
    )


def _teacher(stage: Taught, model: Outlook) -> ModelSource:
    return open_model(stage.teacher or str(model.original), trust_remote_code=model.trust_remote_code)


def _pair_faults(
    named: Choice, model: Outlook | ModelSource, teacher: ModelSource, where: str
) -> list[Fault]:
    """What is wrong with comparing blocks of ``model`` and of ``teacher`` as ``named`` says."""
    expected = "a model of repeated blocks whose configuration has a hidden_size"
    faults = [
        Fault(where, f"{expected}, as {side}", type(side_of.config).__name__, "Leave features out.")
        for side, side_of in (("student", model), ("teacher", teacher))
        if not side_of.anatomy.blocks or not width_of(side_of.config)
    ]
    layers = _layers(named)
    counts = len(model.anatomy.blocks), len(teacher.anatomy.blocks)
    return faults or mapping_faults(layers, *counts, f"{where}.{LAYERS}")


def pairs_of(named: Choice, model: Outlook | ModelSource, teacher: ModelSource) -> Pairs:
    """Blocks of ``model`` and of ``teacher`` that the feature loss ``named``, without a fault, compares."""
    return paired(_layers(named), len(model.anatomy.blocks), len(teacher.anatomy.blocks))


def _layers(named: Choice) -> Any:
    """As the recipe wrote them, or what the method has by default."""
    own: Any = FEATURE_LOSSES.get(named.method, FeatureFields)
    default = next(f.default for f in fields(own) if f.name == LAYERS)
    return dict(named.options).get(LAYERS, default)


def _loss(stage: Taught) -> Part:
    """The distillation losses."""
    losses = tuple((choice.method, dict(choice.options)) for choice in choices_of(stage.loss))
    mixed = {"temperature": stage.temperature, "cross_entropy_weight": stage.cross_entropy_weight}
    return Part(DIVERGENCES, {"losses": losses, **mixed})
