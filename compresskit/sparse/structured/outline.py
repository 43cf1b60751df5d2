"""From what a cut asks for to the shape it leaves: given numbers made legal, the others chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from compresskit.errors import Fault, PatternError
from compresskit.sparse.structured import IMPORTANCES
from compresskit.sparse.structured.compensation import cut_kinds, with_biases
from compresskit.sparse.structured.coupling import kinds_of_block
from compresskit.sparse.structured.deadline import largest_within
from compresskit.sparse.structured.dimensions import (
    FFN,
    HEADS,
    HIDDEN,
    UNITS,
    WIDTHS,
    Dimensions,
    find_dimensions,
)
from compresskit.sparse.structured.position import moved, moved_note
from compresskit.sparse.structured.resize import Changes, resized
from compresskit.sparse.structured.shapes import (
    TOLERANCE,
    Choices,
    Count,
    Shape,
    choose_units,
    find_shape,
    legal_units,
)
from compresskit.sparse.structured.surgery import Patient, Surgery, operate, require_fit, spaced

if TYPE_CHECKING:
    from compresskit.sparse.structured.cut import Cut
    from compresskit.sparse.structured.latency import Latency

TRIMS = ("width", "depth", "both")


class Outline:
    """What ``cut`` means for one model; reads no weight.

    Args:
        cut: its fields have no faults by themselves.
        patient: the model.
        latency: the time of a request to a model, where ``cut`` asks for it.
    """

    def __init__(
        self, cut: Cut, patient: Patient, latency: Callable[[Patient], Latency] | None = None
    ) -> None:
        self.cut, self.patient, self.latency = cut, patient, latency
        self.given = {kind: value for kind in WIDTHS if (value := getattr(cut, kind)) is not None}
        self.target = "parameters" if cut.milliseconds is None else "milliseconds"
        chooses = getattr(cut, self.target) is not None
        self.free = [k for k in WIDTHS if chooses and cut.trim != "depth" and k not in self.given]
        self.depth_is_free = chooses and cut.trim != "width" and cut.layers is None
        self.total = len(patient.anatomy.blocks)
        self.parameters = patient.anatomy.num_parameters

    def surgery(self) -> Surgery:
        """The shape that is left, and what to tell of it.

        Raises:
            ModelError: no key of the configuration sets what is to be cut, or no units can be told apart.
            PatternError: what is asked for is not legal, or nothing is left to choose.
        """
        dimensions, whole = self._dimensions(), self.patient
        shape, switched = self._shape(dimensions), Changes()
        if self.cut.compensate:  # where widths are chosen, biases count: only what is cut then gets one
            switched = self._give_biases(dimensions, shape)
            if switched:
                dimensions = self._dimensions()
                shape = self._shape(dimensions, within=shape)
        self._require_alike(shape)
        notes = [*self._notes(dimensions, shape), *(f"{key} is on: layers get biases." for key in switched)]
        surgery = operate(self.patient, dimensions, shape.blocks, shape.units, notes)
        names = moved(self.patient, spaced(self.total, shape.blocks))
        surgery = replace(surgery, notes=(*surgery.notes, *moved_note(names)))
        if self.cut.parameters is not None:
            self._require_near(surgery.anatomy.num_parameters, self.cut.parameters)
        added = self.patient.anatomy.parameter_shapes.keys() - whole.anatomy.parameter_shapes.keys()
        surgery = replace(surgery, switched=switched, added=frozenset(added))
        if self.latency is not None:
            left = replace(whole, config=surgery.config, anatomy=surgery.anatomy)
            surgery = replace(surgery, latency=self.latency(left), latency_before=self.latency(whole))
        return surgery

    def _shape(self, dimensions: Dimensions | None, within: Shape | None = None) -> Shape:
        """The shape that is left; where widths are chosen, those are cut that ``within`` cuts."""
        units = self._given_units(dimensions) if dimensions else {}
        shape = Shape(self.total if self.cut.layers is None else self.cut.layers, units)
        if self.cut.parameters is not None:
            return self._chooser(dimensions, shape, within)(self.cut.parameters)
        if self.cut.milliseconds is None:
            return shape
        assert self.latency is not None
        latency, patient = self.latency, self.patient

        def milliseconds(shape: Shape) -> float:
            keep = spaced(self.total, shape.blocks)
            config, anatomy = require_fit(patient, dimensions, keep, shape.units)
            return latency(replace(patient, config=config, anatomy=anatomy)).request_ms

        choose = self._chooser(dimensions, shape, within)
        whole_ms = latency(patient).request_ms
        return largest_within(self.cut.milliseconds, choose, milliseconds, whole_ms)

    def _give_biases(self, dimensions: Dimensions | None, shape: Shape) -> Changes:
        """Let ``patient`` have the biases that compensation needs for what ``shape`` cuts."""
        kinds = cut_kinds(shape.units)
        if dimensions is None or not kinds:
            got, cure = "neither", "Leave compensate out, or cut ffn or heads."
            raise PatternError(Fault("compensate", "neurons or heads that are cut", got, cure))
        self.patient, switched = with_biases(self.patient, dimensions, kinds)
        return switched

    def _dimensions(self) -> Dimensions | None:
        if not self.given and not self.free:
            return None
        patient = self.patient
        return find_dimensions(
            tuple(self.given),
            patient.config,
            patient.anatomy,
            patient.directory,
            optional=tuple(self.free),
            trust_remote_code=patient.trust_remote_code,
        )

    def _legal(self, dimensions: Dimensions, kind: str) -> list[int]:
        width = dimensions.widths[kind]
        if not dimensions.heads_follow or kind == FFN:
            return legal_units(width, self.cut.multiple)
        heads, hidden = dimensions.widths[HEADS], dimensions.widths[HIDDEN]
        together = legal_units(heads, self.cut.multiple, follows=hidden)
        return together if kind == HEADS else [hidden.units * u // heads.units for u in together]

    def _accepts(self, dimensions: Dimensions, units: Mapping[str, int]) -> bool:
        """Whether the architecture allows these numbers together, as where heads have to divide channels."""
        try:
            resized(self.patient.config, dimensions.changes(units))
        except Exception:  # whatever a configuration raises over a wrong value
            return False
        return True

    def _given_units(self, dimensions: Dimensions) -> dict[str, int]:
        """Legal numbers for the widths that are given; heads that follow are as many as channels leave."""
        units: dict[str, int] = {}
        undecided = {*self.given, *self.free}
        for kind in (FFN, HEADS, HIDDEN):
            if kind not in self.given:
                continue
            undecided.remove(kind)
            legal = self._legal(dimensions, kind)
            if kind != FFN and not dimensions.heads_follow and not undecided & {HEADS, HIDDEN}:
                legal = [u for u in legal if self._accepts(dimensions, {**units, kind: u})]
            units[kind] = choose_units(self.given[kind], dimensions.widths[kind], legal, self.cut.multiple)
        if dimensions.heads_follow and HIDDEN in units:
            heads, hidden = dimensions.widths[HEADS], dimensions.widths[HIDDEN]
            follow = units[HIDDEN] * heads.units // hidden.units
            if units.setdefault(HEADS, follow) != follow:
                expected = f"{follow} of {heads.units}, which follow from {units[HIDDEN]} hidden channels"
                cure = "Leave heads out: in this model hidden sets them."
                raise PatternError(Fault(HEADS, expected, str(units[HEADS]), cure))
        return units

    def _chooser(
        self, dimensions: Dimensions | None, given: Shape, within: Shape | None
    ) -> Callable[[float], Shape]:
        """What gives the shape that leaves a fraction of all parameters."""
        widths = dimensions.widths if dimensions else {}
        units: dict[str, Sequence[int]] = {}
        for kind, width in widths.items():
            if kind in given.units:
                units[kind] = [given.units[kind]]
            elif dimensions and (kind in self.free or dimensions.heads_follow):
                is_cut = within and kind in within.units
                units[kind] = [] if within and not is_cut else self._legal(dimensions, kind)
                units[kind] = [*units[kind], *(() if is_cut else [width.units])]
        blocks = range(1, self.total + 1) if self.depth_is_free else [given.blocks]
        free = frozenset({*self.free, *(["layers"] if self.depth_is_free else [])})
        if not free & {"layers", *widths}:
            cure = f"Leave out what {self.target} is to choose, or trim both."
            raise PatternError(Fault(self.target, "something left to choose", "every number given", cure))
        follow = dimensions is not None and dimensions.heads_follow
        count = Count(self.patient.anatomy, dimensions)
        choices = Choices(blocks=blocks, units=units, free=free)

        def accepts(shape: Shape) -> bool:
            return dimensions is None or self._accepts(dimensions, shape.units)

        def choose(fraction: float) -> Shape:
            found = find_shape(count, choices, fraction * self.parameters, accepts, heads_follow=follow)
            if found is None:
                cure = f"Leave one of them to {self.target}."
                got = f"{', '.join(self.given)} that go with no other width"
                raise PatternError(Fault(self.target, "widths that the architecture allows", got, cure))
            cut = {kind: n for kind, n in found.units.items() if n < widths[kind].units}
            return Shape(found.blocks, cut)

        return choose

    def _require_alike(self, shape: Shape) -> None:
        """What is planned is what is left, whichever blocks the data will choose."""
        kinds = kinds_of_block(self.patient.anatomy)
        if shape.blocks == self.total or kinds == 1 or not IMPORTANCES[self.cut.importance].reads_data:
            return
        expected = "blocks that all have the same parameters, where data chooses which stay"
        cure = "Set importance: magnitude, which keeps evenly spaced blocks."
        raise PatternError(Fault("importance", expected, f"{kinds} kinds of block", cure))

    def _require_near(self, left: int, parameters: float) -> None:
        """The shape nearest to the target is near enough."""
        total = self.parameters
        if abs(left / (parameters * total) - 1) <= TOLERANCE and left < total:
            return
        expected = "a fraction near one that a legal shape leaves"
        cure = f"The nearest is {left / total:.3g} ({left} of {total} parameters)."
        if left < total:
            cure += " Ask for that, lower multiple, or trim both."
        raise PatternError(Fault("parameters", expected, str(parameters), cure))

    def _notes(self, dimensions: Dimensions | None, shape: Shape) -> list[str]:
        notes = []
        if shape.blocks < self.total:
            notes.append(f"{self.total - shape.blocks} of {self.total} blocks go.")
        if dimensions:
            notes += [self._width_note(dimensions, kind, units) for kind, units in shape.units.items()]
            notes += [f"{kind}: all stay; {why}." for kind, why in self._uncut(dimensions, shape).items()]
        return notes

    def _uncut(self, dimensions: Dimensions, shape: Shape) -> dict[str, str]:
        """Widths that were to be chosen and are left as they are, and why."""
        found = dict(dimensions.missing)
        for kind in self.free:
            if kind in dimensions.widths and kind not in shape.units:
                width, legal = dimensions.widths[kind], self._legal(dimensions, kind)
                found[kind] = "no shape with fewer is nearer to the number of parameters"
                if self.cut.milliseconds is not None:
                    found[kind] = "what else goes is enough"
                if not legal:
                    found[kind] = f"no fewer than {width.units} make a multiple of {self.cut.multiple}"
                if width.units == 1:
                    found[kind] = "expected more than one group, got one: they share keys and values"
        return found

    def _width_note(self, dimensions: Dimensions, kind: str, units: int) -> str:
        width = dimensions.widths[kind]
        note = f"{kind}: {units} of {width.units} {UNITS[kind]} stay"
        if kind == HEADS and width.parts > 1:
            note += f", each of {width.parts} query heads and the key/value head they share"
        if kind == HEADS and dimensions.heads_follow:
            note += ", as many as the hidden channels leave"
        wanted = self.given.get(kind)
        if isinstance(wanted, float) and wanted * width.units != units:
            note += f", the legal number nearest to {wanted:g}"
        return f"{note}."
