"""What every training stage of a recipe will take on a machine, and how to train it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compresskit.errors import Fault, PlanError
from compresskit.foresight.candidates import Row, best, candidates
from compresskit.foresight.devices import Machine
from compresskit.foresight.seldom import seldom_hint
from compresskit.foresight.sketch import sketched
from compresskit.foresight.states import ITEM
from compresskit.foresight.subject import Subject, teacher_of, untold
from compresskit.modeling import resolve_device
from compresskit.progress import size
from compresskit.quant.outlook import forecast_rounding
from compresskit.recipe import Recipe, resolved
from compresskit.stage import Json, Outlook, Stage

OFFLOADED = "What is offloaded lies in the host's memory, which is not counted here."


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one training stage will take.

    Attributes:
        subject: the stage.
        rows: every combination, the best first.
        notes: what a reader should know, in full sentences.
    """

    subject: Subject
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Row | None:
        """The combination to choose; None where none fits."""
        return best(list(self.rows))


@dataclass(frozen=True, slots=True)
class Foresight:
    """What a recipe's training stages will take on a machine.

    Attributes:
        recipe: with absolute paths.
        machine: where.
        forecasts: one a training stage.
        notes: what a reader should know, in full sentences.
    """

    recipe: Recipe
    machine: Machine
    forecasts: tuple[Forecast, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Json]:
        """All of it as plain data."""
        machine = asdict(self.machine) | {"usable_bytes": self.machine.usable_bytes}
        stages = [
            {
                "name": one.subject.name,
                "parameters": one.subject.model.anatomy.num_parameters,
                "tokens_per_step": one.subject.stage.batch_size * one.subject.tokens,
                "recommended": None if one.best is None else row_json(one.best),
                "rows": [row_json(row) for row in one.rows],
                "notes": list(one.notes),
            }
            for one in self.forecasts
        ]
        return {"model": self.recipe.model, "machine": machine, "stages": stages, "notes": list(self.notes)}


def row_json(row: Row) -> dict[str, Json]:
    """A row as plain data: bytes, seconds and tokens a second."""
    way = row.combination
    found: dict[str, Json] = {
        "strategy": way.strategy,
        "checkpointing": way.checkpointing,
        "teacher_placement": way.placement or None,
        "micro_batch_size": way.rows,
        "passes": row.passes,
        "set": settings(row),
    }
    if row.refused:
        return found | {"refused": row.refused}
    assert row.peak is not None
    assert row.pace is not None
    return found | {
        "fits": row.fits,
        "peak_bytes": row.peak.bytes,
        "peak_at": row.peak.name,
        "terms_bytes": {name: round(count) for name, count in row.peak.terms.items()},
        "step_s": row.pace.total_s,
        "compute_s": row.pace.compute_s,
        "communication_s": row.pace.communication_s,
        "exposed_s": row.pace.exposed_s,
        "optimiser_s": row.pace.step_s,
        "tokens_per_s": row.pace.tokens_s,
    }


def settings(row: Row, stage: Any = None) -> dict[str, Json]:
    """The fields to write into a recipe, as plain data; without those that ``stage`` has already."""
    plain: Mapping[str, Any] = row.combination.changes
    told = {n: v for n, v in plain.items() if stage is None or getattr(stage, n, None) != v}
    return {n: getattr(v, "method", v) for n, v in told.items() if v is not None and n != "context_length"}


def foresee(recipe: Recipe, machine: Machine) -> Foresight:
    """Predict every training stage of ``recipe`` on ``machine``; reads no weight, and needs none.

    Args:
        recipe: its models may be configurations alone.
        machine: where it would run.

    Returns:
        The forecast of each stage that trains.

    Raises:
        ModelError: a model's configuration cannot be read.
        PlanError: no stage trains, or one learns what cannot be predicted.
    """
    recipe = resolved(recipe)
    trust = recipe.trust_remote_code
    source = sketched(recipe.model, revision=recipe.revision, trust_remote_code=trust)
    outlook = Outlook.of(source, data=recipe.data, device=machine.device.kind)
    found: list[Forecast] = []
    faults: list[Fault] = []
    for index, stage in enumerate(recipe.stages):
        if stage.trains:
            faults += _unforeseen(stage, outlook, f"stages[{index}]")
            if not faults:
                name = f"{index + 1}-{stage.kind}"
                subject = Subject(name, stage, outlook, teacher_of(stage, source))
                rows = candidates(subject, machine)
                hint = seldom_hint(subject, machine, best(rows))
                notes = (*untold(stage), *hint, _loading(subject, machine))
                found.append(Forecast(subject, tuple(rows), notes))
        outlook = _after(stage, outlook)
    if not any(stage.trains for stage in recipe.stages):
        cure = "Plan it without --gpus or --here."
        faults.append(Fault("stages", "a stage that trains", "none", cure))
    if faults:
        raise PlanError(*(Fault(recipe.place(f.where), f.expected, f.got, f.cure) for f in faults))
    offloads = any("offload" in row.combination.strategy for one in found for row in one.rows)
    return Foresight(recipe, machine, tuple(found), (OFFLOADED,) if offloads else ())


def _unforeseen(stage: Any, model: Outlook, where: str) -> list[Fault]:
    """Why a stage that trains cannot be predicted."""
    cure = "Plan it without --gpus or --here."
    if stage.learns_sentences:
        return [Fault(where, "a stage that learns next tokens", "one that learns sentences", cure)]
    if not model.anatomy.is_causal or model.anatomy.head is None or not model.anatomy.blocks:
        got = type(model.config).__name__
        return [Fault(where, "a causal language model of repeated blocks", got, cure)]
    return []


def _loading(subject: Subject, machine: Machine) -> str:
    """What each process reads before an engine divides anything."""
    whole = ITEM * subject.model.anatomy.num_parameters
    return (
        f"Before it trains each process has the whole model in the host's memory: {size(whole)}, "
        f"{size(machine.gpus * whole)} on a node."
    )


def _after(stage: Stage, model: Outlook) -> Outlook:
    """What a stage leaves; of one that trains no teacher is asked."""
    if not stage.trains:
        return stage.forecast(model).after
    form = getattr(stage, "form", None)
    if stage.kind == "qat" and form is not None:
        return forecast_rounding(form, model).after
    return model


def here(recipe: Recipe, processes: int | None = None) -> Machine:
    """This machine, as it would train ``recipe``.

    Args:
        recipe: whose device is meant.
        processes: on a CPU; None is what the recipe's training stages ask for.
    """
    from compresskit.foresight.devices import this_machine

    kind = resolve_device(recipe.device).type
    asked = [int(getattr(stage, "processes", 1)) for stage in recipe.stages if stage.trains]
    count = processes or (torch.cuda.device_count() if kind == "cuda" else max(asked, default=1))
    return this_machine(count, kind)
