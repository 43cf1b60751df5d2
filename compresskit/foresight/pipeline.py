"""What each rank of a pipeline holds: the blocks that are its own, and what micro-batches on their way keep.

Schedules and what they hold are those of torch.distributed.pipelining, as
``compresskit.training.driver.pipeline`` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from compresskit.foresight.activations import Pass, Phase
from compresskit.foresight.devices import Machine
from compresskit.foresight.pace import FORWARD, WHOLE, Pace, Work, step_s
from compresskit.foresight.peak import Load, Moment, Teaching, always, fullest, stepping
from compresskit.foresight.states import ITEM, Engine, Held, Shape, numbers
from compresskit.foresight.subject import Subject
from compresskit.training.driver.balance import balanced_stages
from compresskit.training.rules.pipeline import STAGES_A_RANK

GPIPE, ONE_BY_ONE = "gpipe", "1f1b"
PIPELINE = Engine("pipeline")
NORM_BYTES = 16
"""Of a number whose square is added up in float64."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stage of a pipeline.

    Attributes:
        blocks: that it has.
        is_first: whether the embedding is its own.
        is_last: whether the output projection is.
    """

    blocks: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a pipeline.

    Attributes:
        at: its place.
        parts: its stages.
        held: their parameters.
        shared: of these the shape of what the last rank has too, where the output projection is tied.
    """

    at: int
    parts: tuple[Part, ...]
    held: Held
    shared: Shape = ()


@dataclass(frozen=True, slots=True)
class Course:
    """How micro-batches go through a pipeline.

    Attributes:
        schedule: ``gpipe``, ``1f1b`` or ``interleaved``.
        width: ranks of one pipeline.
        count: micro-batches of a step.
        pipelines: side by side.
        states: bytes of a micro-batch's hidden states.
        blocks: of the model.
        first: a pass where there are no gradients yet.
        later: one that adds to them.
    """

    schedule: str
    width: int
    count: int
    pipelines: int
    states: float
    blocks: int
    first: Pass
    later: Pass


def ranks_of(subject: Subject, stage: Any) -> tuple[Rank, ...]:
    """The ranks of one pipeline of ``stage``, which can be divided so."""
    anatomy, width = subject.model.anatomy, stage.pipeline_stages
    count = width * STAGES_A_RANK.get(stage.pipeline_schedule, 1)
    every, shapes = anatomy.parameter_shapes, subject.shapes(stage)
    head = f"{anatomy.head}.weight"
    costs = {block: 0.0 for block in anatomy.blocks}
    for name, shape in every.items():
        if (block := anatomy.block_of(name)) and len(shape) > 1:
            costs[block] += prod(shape)
    stages = balanced_stages(list(costs.values()), count, last=float(prod(every[head])))
    number = {block: i for i, own in enumerate(stages) for block in anatomy.blocks[own.start : own.stop]}
    seen_block = False
    owner: dict[str, int] = {}
    for name in every:  # what stands after the blocks is called after them
        block = anatomy.block_of(name)
        seen_block = seen_block or block is not None
        owner[name] = number[block] if block else (count - 1) * seen_block
    owner[head] = count - 1
    tied = head not in shapes
    found = []
    for at in range(width):
        mine = range(at, count, width)
        own = {n: every[n] for n in every if owner[n] in mine and (n in shapes or n == head)}
        parts = tuple(Part(len(stages[i]), i == 0, i == count - 1) for i in mine)
        # Of what else is called before the first block every rank has a copy, and does not train it.
        again = (n for n in shapes if owner[n] == 0 and anatomy.block_of(n) is None)
        frozen = [shapes[n] for n in again if at and n != f"{anatomy.embeddings}.weight"]
        shared = every[head] if tied and at in (0, width - 1) else ()
        found.append(Rank(at, parts, Held(tuple(own.values()), tuple(frozen)), shared))
    return tuple(found)


def operations(schedule: str, width: int, at: int, count: int) -> list[tuple[bool, int]]:
    """What a rank does in a step, in order: whether forward, and in which of its stages.

    Args:
        schedule: of the pipeline.
        width: ranks of it.
        at: place of the rank.
        count: micro-batches.
    """
    parts = STAGES_A_RANK.get(schedule, 1)
    total = count * parts
    each = count // max(1, count // width)  # micro-batches of a round, where there are several stages
    if schedule == GPIPE:
        ahead = total
    elif schedule == ONE_BY_ONE:
        ahead = min(count, width - at) - 1
    else:
        ahead = min((parts - 1) * each + 2 * (width - 1 - at), total)
    forward = [(True, i // each % parts) for i in range(total)]
    back = [(False, parts - 1 - i // each % parts) for i in range(total)]
    found = forward[:ahead]
    for pair in zip(forward[ahead:], back, strict=False):
        found += pair
    return found + back[total - ahead :]


def pipeline_peak(load: Load, ranks: tuple[Rank, ...], course: Course) -> Moment:
    """The moment of a step at which some rank holds most, and of what.

    Args:
        load: of a pass of the whole model.
        ranks: of one pipeline.
        course: of its micro-batches.
    """
    return max((_peak(load, rank, course) for rank in ranks), key=lambda moment: moment.bytes)


def _peak(load: Load, rank: Rank, course: Course) -> Moment:
    taught = any(part.is_last for part in rank.parts)
    load = replace(load, held=rank.held, teaching=load.teaching if taught else Teaching())
    kept = always(load, PIPELINE)
    received = sum((not part.is_first) + (not part.is_last) for part in rank.parts)
    kept["buffers"] += received * course.count * course.states
    total = float(ITEM * numbers(rank.held.trained))
    largest = max((prod(shape) for shape in rank.held.trained), default=0)
    summed = float(ITEM * prod(rank.shared)) if rank.shared else 0.0
    if course.pipelines > 1:
        summed = max(summed, total)
    ends = ("norm", {"gradients": total, "buffers": max(summed, NORM_BYTES * largest)})
    return fullest(kept, (*_passes(load, rank, course, total), ends, stepping(load, PIPELINE)))


def _passes(
    load: Load, rank: Rank, course: Course, total: float
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Each forward and backward pass of a micro-batch through one of the rank's stages."""
    alive = left = heard = 0.0
    graded = False
    for forward, number in operations(course.schedule, course.width, rank.at, course.count):
        part = rank.parts[number]
        keeps = sum(phase.kept for _, phase in _forward(course, part))
        gradients = total if graded else 0.0
        if forward:
            heard += load.teaching.signal * part.is_last
            if part.is_last and load.teaching.passing:
                held = {"activations": alive + left, "teacher": heard + load.teaching.passing}
                yield "teacher", held | {"gradients": gradients}
            phases = _forward(course, part)
        else:
            phases = _back(course, part, graded)
        now, done = alive, 0.0
        for name, phase in phases:
            yield (
                name,
                {
                    "activations": max(now + left + phase.peak - phase.gradient, 0.0),
                    "gradients": gradients + done + phase.gradient,
                    "loss": load.loss if name == "loss" else 0.0,
                    "teacher": heard,
                },
            )
            now, done = now + phase.kept, done + phase.gradient
        alive += keeps if forward else -keeps
        if not forward:
            heard -= load.teaching.signal * part.is_last
            left += course.states * _unsent(course.schedule, part, left > 0)
            graded = True


def _unsent(schedule: str, part: Part, some: bool) -> int:
    """Hidden states, and gradients of them, that are held till the end of the step after a backward pass."""
    if schedule == ONE_BY_ONE:  # the last gradient, till the next one
        return int(not part.is_first and not some)
    return (not part.is_first) + (schedule != GPIPE and not part.is_last)


def _forward(course: Course, part: Part) -> list[tuple[str, Phase]]:
    passed = course.first
    begin, head = passed.begin, passed.head
    if not part.is_first:  # the states came from the stage before
        peak, kept = (max(size - course.states, 0.0) for size in (begin.peak, begin.kept))
        begin = Phase(peak, kept)
    # Narrow copies of weights that are not needed on the way back: all go when the forward pass is done.
    copies = max(passed.block.kept + passed.block_back.kept, 0.0)
    found = [("begin", begin), *(("forward", passed.block),) * part.blocks]
    if not part.is_last:
        return [*found, ("forward", Phase(0.0, -copies * part.blocks))]
    left = (course.blocks - part.blocks) * copies
    return [*found, ("loss", Phase(head.peak, head.kept + left))]


def _back(course: Course, part: Part, graded: bool) -> list[tuple[str, Phase]]:
    passed = course.later if graded else course.first
    found = [("loss back", passed.head_back)] if part.is_last else []
    found += (("backward", passed.block_back),) * part.blocks
    return [*found, ("end", passed.end)] if part.is_first else found


def pipeline_pace(
    work: Work,
    ranks: tuple[Rank, ...],
    course: Course,
    machine: Machine,
    *,
    precision: str,
    tokens: int,
    recomputed: float,
) -> Pace:
    """Of one optimiser step: the slowest rank's share of all micro-batches, and what the others wait for it.

    Args:
        work: of a token.
        ranks: of one pipeline.
        course: of its micro-batches.
        machine: where.
        precision: that products run in.
        tokens: of a micro-batch.
        recomputed: share of the blocks that are computed once more in the backward pass.
    """
    device = machine.device
    blocks = sum(part.blocks for rank in ranks for part in rank.parts)

    def flops(rank: Rank) -> float:
        own = sum(part.blocks for part in rank.parts) / blocks
        last = any(part.is_last for part in rank.parts)
        return own * work.blocks * (WHOLE + recomputed) + last * (work.head * WHOLE + work.teacher * FORWARD)

    each = tokens * max(map(flops, ranks)) / (device.peak_flops[precision] * device.efficiency)
    stages = max(len(rank.parts) for rank in ranks)
    bubble = (course.width - 1) / (course.count * stages)
    compute = course.count * each * (1 + bubble)
    hops = 2 * stages * (course.count + course.width - 1)  # states forward, their gradients back
    inside = course.width <= machine.gpus
    sent = hops * course.states / (device.link_bytes_s if inside else machine.link_bytes_s)
    trained = max(numbers(rank.held.trained) for rank in ranks)
    if course.pipelines > 1:
        rate = machine.link_bytes_s / course.width if machine.nodes > 1 else device.link_bytes_s
        sent += 2 * ITEM * trained * (course.pipelines - 1) / course.pipelines / rate
    step = step_s(trained, device)
    total = compute + sent + step
    made = course.count * course.pipelines * tokens
    return Pace(compute, sent, sent, step, made / total)
