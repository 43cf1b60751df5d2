"""Cut: take blocks, neurons, heads and hidden channels away; what is left is an ordinary, smaller model.

Paper: see the importances of :data:`compresskit.sparse.structured.IMPORTANCES`, one a file; width and depth
together: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
NeurIPS 2024, https://arxiv.org/abs/2407.14679.

Hidden channels go from the whole residual stream: norms are then taken over those left, and what an
architecture derives from its width (Gemma's factor on embeddings) follows the new one. So does what it
derives from the position of a block, which is told where its modules hold it, and from the number of heads
(slopes of a bias on attention), which is not.

Shapes: L = blocks, U = units of a width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from compresskit.calibration.oneshot import (
    BATCH_TOKENS,
    Calibrated,
    calibration_bytes,
    calibration_rows,
    row_length,
    spilled_bytes,
    walk_bytes,
)
from compresskit.errors import Fault, InputError, PatternError
from compresskit.formats.checkpoint import write_shards
from compresskit.modeling import context_length, copy_sidecars, resolve_device
from compresskit.options import Within
from compresskit.registry import nearest
from compresskit.sparse.structured import IMPORTANCES
from compresskit.sparse.structured.base import Subject
from compresskit.sparse.structured.compensation import compensate
from compresskit.sparse.structured.dimensions import WIDTHS
from compresskit.sparse.structured.latency import stopwatch_for
from compresskit.sparse.structured.outline import TRIMS, Outline
from compresskit.sparse.structured.position import moved, moved_note
from compresskit.sparse.structured.surgery import (
    Patient,
    Surgery,
    choose,
    require_fit,
    smaller_tensors,
    write_config,
)
from compresskit.stage import Forecast, LayerRecord, Outlook, StageResult
from compresskit.timing import request_tokens

if TYPE_CHECKING:
    from compresskit.modeling.source import ModelSource
    from compresskit.stage import StageContext

SHARD_BYTES = 1 << 28
LOGITS = 5
"""Tensors of the size of a batch's logits that are alive at once where a loss is differentiated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Structured pruning; a short training stage afterwards wins most of the quality back.

    A width is a fraction to keep, rounded to the nearest legal number, or a whole number that has to be
    legal; None keeps all, or leaves it to ``parameters`` or ``milliseconds``.

    A time is that of one request as ``compresskit.measure`` times it, batch 1, on this machine: a prompt, and
    tokens after it where the model predicts the next one, with as many threads as OMP_NUM_THREADS says or
    there are cores, in the dtype that is stored. Models of candidate shapes are timed with random weights
    while the stage is planned; times are kept, so that the run cuts what was planned.

    Attributes:
        layers: blocks to keep.
        ffn: neurons of each feed-forward network to keep: a fraction, or how many.
        heads: query heads of each block to keep: a fraction, or how many. They go with the key/value head
            they share, and its other query heads; the size of a head stays.
        hidden: channels of the residual stream to keep: a fraction, or how many.
        parameters: fraction of all parameters to keep; what ``trim`` names and is not given is chosen so.
        milliseconds: of a request at most; what ``trim`` names and is not given is chosen so that most
            parameters stay.
        trim: what ``parameters`` or ``milliseconds`` may choose: ``width``, ``depth`` or ``both``.
        importance: what stays: a name of ``compresskit.sparse.structured.IMPORTANCES``.
        compensate: add what neurons and heads that go gave on average to the bias of the layer that read
            them; reads calibration rows.
        multiple: widths are multiples of it: 8 suits CPUs, 64 or 128 GPUs.
        timed: tell what a request will take, whatever the cut is chosen by.
        prompt_tokens: of a request that is timed; None is 128, or what fits.
        decode_tokens: of a request that is timed, one by one after the prompt; None is 32, or what fits.
    """

    layers: int | None = None
    ffn: int | float | None = None
    heads: int | float | None = None
    hidden: int | float | None = None
    parameters: float | None = None
    milliseconds: Annotated[float | None, Within(0, above=True)] = None
    trim: str = "width"
    importance: str = "magnitude"
    compensate: bool = False
    multiple: Annotated[int, Within(1)] = 8
    timed: bool = False
    prompt_tokens: Annotated[int | None, Within(1)] = None
    decode_tokens: Annotated[int | None, Within(1)] = None

    @property
    def reads_data(self) -> bool:
        """Whether calibration rows are needed."""
        known = self.importance in IMPORTANCES
        return self.compensate or (known and IMPORTANCES[self.importance].reads_data)

    def faults(self, model: Outlook, where: str) -> list[Fault]:
        """Everything wrong for such a ``model``; reads no weight."""
        faults = self._field_faults(model, where)
        if faults:
            return faults
        try:
            self._plan(model)
        except InputError as error:
            named = ("layers", "parameters", "milliseconds", "compensate", "importance", *WIDTHS)
            faults = [
                Fault(f"{where}.{f.where}" if f.where in named else f.where, f.expected, f.got, f.cure)
                for f in error.faults
                if isinstance(f, Fault)
            ]
        return faults

    def forecast(self, model: Outlook, calibrated: Calibrated) -> Forecast:
        """What the smaller model will be; called only when there are no faults.

        Args:
            model: what the stage will be given.
            calibrated: says what to calibrate on, for an importance that reads data.
        """
        surgery = self._plan(model)
        after = replace(
            model, anatomy=surgery.anatomy, config=surgery.config, layer_bits={}, layer_schemes={}
        )
        sizes = [4 * prod(shape) for shape in model.anatomy.parameter_shapes.values()]
        memory, spilled = min(after.checkpoint_bytes, SHARD_BYTES) + 3 * max(sizes), 0
        if self.reads_data:
            rows = calibration_bytes(calibrated, model.config, model.anatomy)
            if IMPORTANCES[self.importance].reads_gradients:
                whole = model.anatomy.num_parameters * model.weight_bytes
                rows += round(2 * whole) + (len(model.anatomy.blocks) - 1) * rows
                rows += _logits_bytes(calibrated, model)
            else:
                rows += round(walk_bytes(model.anatomy, model.weight_bytes))
                spilled = spilled_bytes(calibrated, model.config, model.anatomy)
            memory = max(memory, rows)
        return Forecast(
            after=after,
            layers=sum(
                1
                for name, linear in surgery.anatomy.linears.items()
                if not linear.tied and _is_cut(name, model, surgery)
            ),
            memory_bytes=memory,
            scratch_bytes=spilled,
            notes=surgery.notes,
        )

    def run(self, model: ModelSource, context: StageContext, calibrated: Calibrated) -> StageResult:
        """Write the smaller model into ``context.out``.

        Args:
            model: a dense checkpoint with no pattern or grid to keep.
            context: its ``out`` gets a complete model whose config.json tells the new sizes.
            calibrated: says what to calibrate on, for an importance that reads data.

        Returns:
            One record per layer that became smaller.

        Raises:
            PatternError: an earlier stage promised zeros or a grid, which a cut would break.
            ModelError: no key of the configuration sets what is to be cut, no units can be told apart, or a
                block that stays would be another one in its new place.
            DataError: the calibration data cannot be read.
        """
        held = sorted({p.kind for p in context.promises} & {"zeros", "grid"})
        if held:
            got = f"earlier promises of {' and '.join(held)}"
            raise PatternError(
                Fault("cut", "a model without zeros or grids to keep", got, "Put the cut first.")
            )
        patient = Patient(model.config, model.anatomy, model.directory, model.trust_remote_code)
        device = resolve_device(context.device).type
        surgery = self._surgery(patient, model.bytes / model.anatomy.num_parameters, device)
        subject, warnings = self._subject(model, surgery, context, calibrated)
        scores = IMPORTANCES[self.importance]().measure(subject)
        kept, tokens = choose(surgery, scores, len(model.anatomy.blocks)), scores.num_tokens
        if self.compensate:
            shifts, tokens = compensate(subject, surgery, kept)
            kept = replace(kept, shifts=shifts)
        _, left = require_fit(surgery.patient, surgery.dimensions, kept.blocks, surgery.units)
        records: list[LayerRecord] = []
        tensors = smaller_tensors(model, surgery, kept, records)
        write_shards(context.out, tensors, shard_bytes=SHARD_BYTES)
        changes = {**surgery.switched, **patient.with_blocks(kept.blocks)}
        if surgery.dimensions is not None:
            changes |= surgery.dimensions.changes(surgery.units)
        write_config(model, changes, context.out)
        copy_sidecars(model.directory, context.out)
        warnings = (*warnings, *moved_note(moved(surgery.patient, kept.blocks)))
        whole = surgery.dimensions.widths if surgery.dimensions else {}
        times = {"forecast": surgery.latency, "forecast_before": surgery.latency_before}
        return StageResult(
            layers=tuple(records),
            metrics={
                "blocks_kept": list(kept.blocks),
                "units_before": {kind: whole[kind].units for kind in surgery.units},
                "units_kept": dict(surgery.units),
                "parameters_before": model.anatomy.num_parameters,
                "parameters_kept": left.num_parameters,
                "calibration_tokens": tokens,
                **{name: latency.to_json() for name, latency in times.items() if latency is not None},
            },
            warnings=warnings,
        )

    def _plan(self, model: Outlook) -> Surgery:
        patient = Patient(model.config, model.anatomy, model.original, model.trust_remote_code)
        return self._surgery(patient, model.weight_bytes, model.device)

    def _surgery(self, patient: Patient, weight_bytes: float, device: str) -> Surgery:
        """What is left; with its time and a note on that where this is asked for."""
        if self.milliseconds is None and not self.timed:
            return Outline(self, patient).surgery()
        lengths = request_tokens(context_length(patient.config), self.prompt_tokens, self.decode_tokens)
        stopwatch = stopwatch_for(patient.config, weight_bytes, device, *lengths)
        surgery = Outline(self, patient, stopwatch).surgery()
        assert surgery.latency is not None
        assert surgery.latency_before is not None
        notes = stopwatch.notes(surgery.latency, surgery.latency_before)
        return replace(surgery, notes=(*surgery.notes, *notes))

    def _subject(
        self, model: ModelSource, surgery: Surgery, context: StageContext, calibrated: Calibrated
    ) -> tuple[Subject, tuple[str, ...]]:
        """What the importance looks at, and what is to be said of the data."""
        subject = Subject(
            model=model, dimensions=surgery.dimensions, device=context.device, dtype=context.dtype
        )
        if self.reads_data:
            rows, spill, warnings = calibration_rows(
                calibrated, model, context.data, cache=context.cache, scratch=context.scratch
            )
            return replace(subject, rows=rows, spill=spill), warnings
        if calibrated.data is not None:
            return subject, (f"{self.importance} reads no data; the data given to it was left unread.",)
        return subject, ()

    def _field_faults(self, model: Outlook, where: str) -> list[Fault]:
        """What is wrong with single fields."""
        faults, blocks = [], len(model.anatomy.blocks)
        asked = [self.layers, self.ffn, self.heads, self.hidden, self.parameters, self.milliseconds]
        if all(value is None for value in asked):
            expected = "layers, ffn, heads, hidden, parameters or milliseconds"
            cure = "Say how many layers to keep, or parameters: 0.5."
            faults.append(Fault(where, expected, "none of them", cure))
        if self.layers is not None and blocks < 2:
            got, cure = "one" if blocks else "none", "Leave layers out, or cut another model."
            faults.append(Fault(f"{where}.layers", "a model with blocks to spare", got, cure))
        elif self.layers is not None and not 1 <= self.layers < blocks:
            cure = "Give how many layers to keep."
            faults.append(Fault(f"{where}.layers", f"1 to {blocks - 1} of {blocks}", str(self.layers), cure))
        for name in (*WIDTHS, "parameters"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0 < value < 1:
                cure = "Give the fraction to keep, such as 0.5."
                faults.append(Fault(f"{where}.{name}", "a number between 0 and 1", str(value), cure))
        if self.trim not in TRIMS:
            cure = f"Did you mean: {nearest(self.trim, TRIMS)}?"
            faults.append(Fault(f"{where}.trim", ", ".join(TRIMS), repr(self.trim), cure))
        return faults + self._time_faults(model, where) + self._importance_faults(model, where)

    def _time_faults(self, model: Outlook, where: str) -> list[Fault]:
        """What is wrong with a time to keep to, and with the request that takes it."""
        if self.parameters is not None and self.milliseconds is not None:
            got, cure = "both", "Leave one of them out."
            return [Fault(f"{where}.milliseconds", "parameters or milliseconds", got, cure)]
        lengths = {"prompt_tokens": self.prompt_tokens, "decode_tokens": self.decode_tokens}
        if self.milliseconds is None and not self.timed:
            cure = "Leave it out, or set timed: true."
            expected = "nothing where no request is timed"
            return [
                Fault(f"{where}.{n}", expected, str(v), cure) for n, v in lengths.items() if v is not None
            ]
        try:
            request_tokens(context_length(model.config), self.prompt_tokens, self.decode_tokens)
        except InputError as error:
            return [
                Fault(f"{where}: {f.where}", f.expected, f.got, f.cure)
                for f in error.faults
                if isinstance(f, Fault)
            ]
        return []

    def _importance_faults(self, model: Outlook, where: str) -> list[Fault]:
        if self.importance not in IMPORTANCES:
            cure = f"Did you mean: {nearest(self.importance, IMPORTANCES)}?"
            return [Fault(f"{where}.importance", "the name of an importance", repr(self.importance), cure)]
        if IMPORTANCES[self.importance].reads_gradients and not model.anatomy.is_causal:
            expected = "an importance that does without the loss of the next token"
            cure = "Choose activation or magnitude: this model does not predict the next token."
            return [Fault(f"{where}.importance", expected, self.importance, cure)]
        return []


def _logits_bytes(calibrated: Calibrated, model: Outlook) -> int:
    """Logits of a batch, as made and in float32, what the loss keeps of them, and the gradients of both."""
    head = model.anatomy.linears.get(model.anatomy.head or "")
    length = row_length(calibrated, model.config)
    tokens = max(length, min(BATCH_TOKENS, calibrated.samples * length))
    return LOGITS * 4 * tokens * (head.out_features if head else 0)


def _is_cut(name: str, model: Outlook, surgery: Surgery) -> bool:
    """Whether layer ``name`` of the smaller model lost units; blocks are alike, whichever it was."""
    dimensions = surgery.dimensions
    if dimensions is None:
        return False
    axes: Any = dimensions.axes_of(f"{name}.weight", model.anatomy)
    return any(axis.kind in surgery.units for axis in axes)
