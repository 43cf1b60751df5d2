"""Every way to train a stage on a machine: which are refused and why, what the others take, which is best.

Only what leaves the result as it is varies: how states are divided, what is computed twice, how many rows
pass at once, where the teacher's weights lie. The rows of a step and the precision are the recipe's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import log, prod
from typing import Any

from compresskit.errors import Fault
from compresskit.foresight.devices import Machine
from compresskit.foresight.gathering import most_gathered, visits_of
from compresskit.foresight.pace import Pace, Work, flops_of, pace
from compresskit.foresight.peak import WHOLE_BLOCKS, Load, Moment, loss_inside, peak
from compresskit.foresight.pipeline import Course, pipeline_pace, pipeline_peak, ranks_of
from compresskit.foresight.split import exchanged_bytes
from compresskit.foresight.states import ITEM, Engine, engine_of, numbers
from compresskit.foresight.subject import LIVE_TEACHERS, Subject
from compresskit.options import Choice
from compresskit.training.faults import broken_rules, number_faults
from compresskit.training.lesson import REPLICATE
from compresskit.training.mesh.plan import tensor_faults
from compresskit.training.outlook import synchronising_bytes
from compresskit.training.rules.asynchronous import ZENFLOW
from compresskit.training.rules.pipeline import STAGES_A_RANK
from compresskit.training.rules.zenflow import shape_faults
from compresskit.training.setting import Setting

SHARD = "shard"
ELSEWHERE = ("-missing", "-device", "-library", "-compiler", "-version")
"""Ends of the names of rules about the machine they are asked on, which need not be the one planned for."""


@dataclass(frozen=True, slots=True)
class Combination:
    """One way to train.

    Attributes:
        strategy: for people, such as ``zero2 + offload``.
        checkpointing: ``none``, ``full`` or ``every 2nd``.
        placement: of the teacher; empty without one.
        changes: of the stage's fields.
    """

    strategy: str
    checkpointing: str
    placement: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of one pass of one process."""
        return int(self.changes.get("micro_batch_size") or 0)


@dataclass(frozen=True, slots=True)
class Row:
    """What a combination comes to.

    Attributes:
        combination: which.
        passes: forward passes of an optimiser step, in each process.
        refused: why it cannot be had; empty where it can.
        peak: where a process holds most, and of what; None where it is refused.
        pace: how long a step takes; None where it is refused.
        fits: whether the device holds it.
    """

    combination: Combination
    passes: int = 0
    refused: str = ""
    peak: Moment | None = None
    pace: Pace | None = None
    fits: bool = False


PLAIN = {"offload": "none", "replicas": 1, "tensor_parallel": 1, "pipeline_stages": 1}
"""Fields of ways to divide, as they are in rows that name another way."""


def candidates(subject: Subject, machine: Machine) -> list[Row]:
    """Every combination for ``subject``, the best first, those that are refused last."""
    rows = [weighed(subject, machine, combination) for combination in combinations(subject, machine)]
    return sorted(rows, key=_order)


def best(rows: list[Row]) -> Row | None:
    """The one to recommend; None where none fits."""
    return next((row for row in rows if row.fits), None)


def _order(row: Row) -> tuple[int, int, int, int]:
    """What fits by speed, within 2% the one with fewer passes, then the smaller; the rest by size."""
    if row.peak is None or row.pace is None:
        return (2, 0, 0, 0)
    if row.fits:
        return (0, -round(50 * log(row.pace.tokens_s)), row.passes, row.peak.bytes)
    return (1, row.peak.bytes, 0, 0)


def combinations(subject: Subject, machine: Machine) -> Iterator[Combination]:
    """All that are worth asking about, legal or not."""
    stage = subject.stage
    known = {f.name for f in fields(stage)}
    common: dict[str, Any] = {"processes": machine.processes, "context_length": subject.tokens}
    for strategy, changes in strategies(known, machine):
        for checkpointing, kept in checkpointings(known):
            for placement, placed in placements(stage, subject.teacher is not None, machine):
                apart = changes.get("tensor_parallel", 1) * changes.get("pipeline_stages", 1)
                for rows in row_counts(stage, machine.processes // apart):
                    plain = {name: value for name, value in PLAIN.items() if name in known}
                    all_changes = common | plain | changes | kept | placed | {"micro_batch_size": rows}
                    if changes["strategy"] != "deepspeed":
                        all_changes["deepspeed_config"] = None
                    yield Combination(strategy, checkpointing, placement, all_changes)


def strategies(known: set[str], machine: Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and fields of the ways to divide; those that this version has fields for."""
    if machine.processes == 1:
        yield "single", {"strategy": "auto"}
    yield "ddp", {"strategy": "ddp"}
    yield "fsdp", {"strategy": "fsdp"}
    if "replicas" in known and machine.nodes > 1:
        yield "hsdp", {"strategy": "fsdp", "replicas": machine.nodes}
    for stage in (1, 2, 3):
        yield f"zero{stage}", {"strategy": "deepspeed", "zero_stage": stage}
    if "offload" in known:
        for stage in (2, 3):
            changes = {"strategy": "deepspeed", "zero_stage": stage, "offload": "optimizer"}
            yield f"zero{stage} + offload", changes
    if "tensor_parallel" in known and machine.gpus > 1:
        name, strategy = ("fsdp x tensor", "fsdp") if machine.nodes > 1 else ("tensor", "tp")
        yield f"{name} {machine.gpus}", {"strategy": strategy, "tensor_parallel": machine.gpus}
    if "pipeline_stages" in known and machine.gpus > 1:
        yield f"pipeline {machine.gpus}", {"strategy": "auto", "pipeline_stages": machine.gpus}


def checkpointings(known: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and fields of what is kept of activations."""
    if "checkpoint_blocks" not in known:
        yield "none", {"activation_checkpointing": False}
        yield "full", {"activation_checkpointing": True}
        return
    for name, recomputes, blocks in (("none", False, 1), ("full", True, 1), ("every 2nd", True, 2)):
        every = {"checkpoint_blocks": blocks, "checkpoint_operators": False}
        yield name, {"activation_checkpointing": recomputes, **{n: v for n, v in every.items() if n in known}}


def placements(stage: Any, taught: bool, machine: Machine) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and fields of where the teacher lies: the recipe's way, and divided instead of copied."""
    if not taught:
        yield "", {}
        return
    chosen: Choice = stage.teacher_placement
    yield chosen.method, {}
    if chosen.method == REPLICATE and machine.processes > 1:
        yield SHARD, {"teacher_placement": Choice(SHARD, chosen.options)}


def row_counts(stage: Any, ranks: int) -> list[int]:
    """Rows of one pass: powers of two that divide a process's share, all of it, and the recipe's."""
    share = max(stage.batch_size // ranks, 1)
    counts = {1 << i for i in range(share.bit_length()) if share % (1 << i) == 0} | {share}
    if stage.micro_batch_size and share % stage.micro_batch_size == 0:
        counts.add(stage.micro_batch_size)
    return sorted(counts)


def refusal(stage: Any, machine: Machine) -> str:
    """The first thing that keeps ``stage`` from training so, with its cure; empty where nothing does."""
    setting = Setting(stage, machine.processes, machine.device.kind)
    for fault in number_faults(stage, "stage"):
        return str(fault)
    # What other rows mend, which have other rows in a pass, is told last.
    for rule, fault in sorted(broken_rules(setting, "stage"), key=lambda b: b[0].field == "micro_batch_size"):
        if machine.here or not rule.name.endswith(ELSEWHERE):
            return f"{rule.name}: expected {fault.expected}, got {fault.got}. {fault.cure}"
    return ""


def weighed(subject: Subject, machine: Machine, combination: Combination) -> Row:
    """What ``combination`` comes to."""
    stage = replace(subject.stage, **combination.changes)
    refused = refusal(stage, machine)
    if not refused:
        faults = [*divided_faults(subject, stage), *subject.placement_faults(stage, "teacher_placement")]
        refused = next(map(str, faults), "")
    if refused:
        return Row(combination, refused=refused)
    setting = Setting(stage, machine.processes, machine.device.kind)
    passes = stage.batch_size // (setting.micro_batch_size * setting.data_ranks)
    engine, load = engine_of(setting), load_of(subject, stage, setting, passes)
    work, rows = work_of(subject, stage), setting.micro_batch_size
    how: dict[str, Any] = {
        "precision": stage.precision if stage.precision in machine.device.peak_flops else "bf16",
        "recomputed": recomputed_of(stage),
    }
    if stage.pipeline_stages > 1:
        ranks, course = ranks_of(subject, stage), course_of(subject, setting, load, passes)
        most = pipeline_peak(load, ranks, course)
        found = pipeline_pace(work, ranks, course, machine, tokens=rows * subject.tokens, **how)
    else:
        most = peak(load, engine)
        tokens = subject.tokens
        found = pace(work, engine, load.held, machine, rows=rows, passes=passes, tokens=tokens, **how)
    return Row(combination, passes, "", most, found, most.bytes <= machine.usable_bytes)


def divided_faults(subject: Subject, stage: Any) -> list[Fault]:
    """Why such a model cannot be split, has too few blocks for a pipeline, or weights unfit for ZenFlow."""
    config, anatomy = subject.model.config, subject.model.anatomy
    if stage.tensor_parallel > 1:
        return tensor_faults(config, anatomy, stage.tensor_parallel, "stage")
    if stage.synchronise == ZENFLOW:
        return shape_faults(subject.shapes(stage), "stage")
    stages = stage.pipeline_stages * STAGES_A_RANK.get(stage.pipeline_schedule, 1)
    if stage.pipeline_stages > 1 and stages > len(anatomy.blocks):
        expected, got = f"at least {stages} blocks, one for each stage", str(len(anatomy.blocks))
        return [Fault("stage.pipeline_stages", expected, got, "Lower pipeline_stages.")]
    return []


def recomputed_of(stage: Any) -> float:
    """Share of the blocks that the backward pass computes once more."""
    return 1 / stage.checkpoint_blocks if stage.activation_checkpointing else 0.0


def course_of(subject: Subject, setting: Setting, load: Load, passes: int) -> Course:
    """How the micro-batches of a step go through the pipelines of ``setting``."""
    stage, rows = setting.fields, setting.micro_batch_size
    width = subject.model.config.get_text_config().hidden_size
    return Course(
        schedule=stage.pipeline_schedule,
        width=stage.pipeline_stages,
        count=passes,
        pipelines=setting.data_ranks,
        states=float(ITEM * rows * subject.tokens * width),
        blocks=load.blocks,
        first=load.passed,
        later=subject.passed(stage, rows, accumulates=True),
    )


def load_of(subject: Subject, stage: Any, setting: Setting, passes: int) -> Load:
    """One pass of one process of ``stage``, which has no faults."""
    rows, config = setting.micro_batch_size, subject.model.config.get_text_config()
    inside = loss_inside(
        rows * (subject.tokens - 1),
        config.vocab_size,
        config.hidden_size,
        device=setting.device,
        precision=stage.precision,
        teaches=subject.teacher is not None,
    )
    engine, held = engine_of(setting), subject.held(stage)
    largest = max(map(prod, held.trained), default=0)
    return Load(
        passed=subject.passed(stage, rows),
        blocks=len(subject.model.anatomy.blocks),
        held=held,
        units=subject.units(stage),
        loss=inside,
        teaching=subject.teaching(stage, rows, subject.tokens),
        optimizer=stage.optimizer,
        accumulates=passes > 1,
        device=setting.device,
        gathered=gathered_of(subject, stage, engine),
        synchronising=synchronising_bytes(stage, numbers(held.trained), largest),
    )


def gathered_of(subject: Subject, stage: Any, engine: Engine) -> Mapping[str, int]:
    """Numbers of weights that ZeRO-3 has whole in each phase of a pass; of another engine none."""
    if engine.kind != "zero3":
        return {}
    anatomy, shapes = subject.model.anatomy, subject.stored(stage)
    again = [stage.recomputes(i) for i in range(len(anatomy.blocks))]
    most = most_gathered(visits_of(anatomy, shapes, again, engine.whole), engine)
    always = sum(count for shape in shapes.values() if (count := prod(shape)) <= engine.whole)
    return {phase: always + most.get(phase, 0) for phase in WHOLE_BLOCKS}


def work_of(subject: Subject, stage: Any) -> Work:
    """What a token of ``subject`` costs, its teacher placed as ``stage`` says."""
    anatomy, config, ways = subject.model.anatomy, subject.model.config, stage.tensor_parallel
    blocks, head = flops_of(anatomy, config, subject.tokens)
    work = Work(blocks, head)
    if ways > 1:
        item = 4 if stage.precision == "fp32" else 2
        work = Work(
            blocks,
            head,
            ways=ways,
            exchanged_bytes=exchanged_bytes(config, anatomy, item, recomputed_of(stage)),
            head_bytes=float(ITEM * prod(anatomy.parameter_shapes[f"{anatomy.head}.weight"])),
        )
    if subject.teacher is None:
        return work
    theirs = flops_of(subject.teacher.anatomy, subject.teacher.config, subject.tokens)
    method = stage.teacher_placement.method
    gathered = float(subject.teacher.bytes) if method == SHARD else 0.0
    return replace(work, teacher=sum(theirs) if method in LIVE_TEACHERS else 0.0, gathered_bytes=gathered)
