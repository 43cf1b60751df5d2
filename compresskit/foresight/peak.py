"""When a process holds most while it trains, and what that consists of.

A step is gone through phase by phase: each block forward, the loss, each block backward, the optimiser. What
a phase holds of activations was traced; what it holds of states, gradients and gathered weights follows from
how the engine divides them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from compresskit.foresight.activations import Pass, Phase
from compresskit.foresight.states import (
    ITEM,
    Engine,
    Held,
    frozen_bytes,
    gradient_bytes,
    master_bytes,
    optimizer_bytes,
    stepping_bytes,
    weight_bytes,
)
from compresskit.foresight.states import numbers as numbers_of
from compresskit.kernels.chunking import BLOCK_COPIES, block_tokens, chunk_tokens

TERMS = (
    "weights",
    "masters",
    "gradients",
    "optimiser",
    "activations",
    "loss",
    "teacher",
    "gathered",
    "buffers",
    "frozen",
    "masks",
    "synchronise",
)
"""What a process holds, in the order it is told."""
WHOLE_BLOCKS = {"begin": 0, "forward": 2, "loss": 1, "loss back": 1, "backward": 3, "end": 1}
"""Blocks whose weights or gradients FSDP2 has whole at once, besides a block's own gradients: the one that
computes, the next that is gathered, and going back the last that is being reduced."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a teacher takes in each process, in bytes.

    Attributes:
        held: of its weights, all the time.
        passing: at most, while it looks at a batch.
        signal: of what it said, until the batch is done with.
    """

    held: float = 0.0
    passing: float = 0.0
    signal: float = 0.0


@dataclass(frozen=True, slots=True)
class Units:
    """What FSDP2 gathers together, in numbers.

    Attributes:
        block: of the largest.
        tail: of the last norm and the output projection, which stay gathered until they went backward.
        embedding: of the token embedding.
        is_tied: whether that is the output projection too, and gathered from the beginning.
    """

    block: int
    tail: int
    embedding: int
    is_tied: bool


@dataclass(frozen=True, slots=True)
class Load:
    """One pass of one process, and everything around it.

    Attributes:
        passed: traced, for the real number of blocks.
        blocks: that number.
        held: parameters.
        units: that are gathered.
        loss: what the fused loss holds inside of itself, in bytes.
        teaching: of the teacher.
        optimizer: its name.
        accumulates: whether a step has several passes.
        device: ``cpu`` or ``cuda``.
        gathered: phase -> numbers of weights that ZeRO-3 has whole in it.
        synchronising: bytes that ``synchronise`` keeps, and those besides while weights are exchanged.
    """

    passed: Pass
    blocks: int
    held: Held
    units: Units
    loss: float
    teaching: Teaching
    optimizer: str
    accumulates: bool
    device: str
    gathered: Mapping[str, int] = field(default_factory=dict)
    synchronising: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Moment:
    """What a process holds at one time.

    Attributes:
        name: of the time.
        terms: a name of ``TERMS`` -> bytes.
    """

    name: str
    terms: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """All of it."""
        return round(sum(self.terms.values()))


def peak(load: Load, engine: Engine) -> Moment:
    """The moment of a step at which a process holds most."""
    exchange = "exchange", {"synchronise": float(load.synchronising[1])}
    return fullest(always(load, engine), (*_passes(load, engine), stepping(load, engine), exchange))


def fullest(kept: Mapping[str, float], times: Iterable[tuple[str, Mapping[str, float]]]) -> Moment:
    """Of some times the one at which most is held, with what is ``kept`` all the time."""
    found: Moment | None = None
    for name, terms in times:
        moment = Moment(name, {term: kept.get(term, 0) + terms.get(term, 0) for term in TERMS})
        if found is None or moment.bytes > found.bytes:
            found = moment
    assert found is not None
    return found


def always(load: Load, engine: Engine) -> dict[str, float]:
    """What is held all the time; the device's part of it."""
    held = load.held
    stepped = 0 if engine.offloads else 1
    buffers = 0.0
    if engine.kind == "ddp":
        buffers = ITEM * numbers_of(held.trained)  # its buckets, of which gradients are views
    if engine.kind == "zero3":
        buffers = ITEM * engine.bucket
    return {
        "weights": weight_bytes(held, engine),
        "masters": stepped * master_bytes(held, engine),
        "optimiser": stepped * optimizer_bytes(held, engine, load.optimizer),
        "gradients": gradient_bytes(held, engine) if engine.kind == "zero3" else 0,
        "teacher": load.teaching.held,
        "buffers": buffers,
        "frozen": frozen_bytes(held, engine),
        "masks": held.extra_bytes,
        "synchronise": load.synchronising[0],
    }


def _passes(load: Load, engine: Engine) -> Iterator[tuple[str, dict[str, float]]]:
    """The teacher, then each phase forward and back."""
    passed, blocks = load.passed, load.blocks
    total = ITEM * numbers_of(load.held.trained)
    keeps = not engine.has_views and engine.kind not in ("zero2", "zero3")
    before = total if load.accumulates and keeps else 0
    if load.teaching.passing:
        yield "teacher", {"teacher": load.teaching.passing, "gradients": before}
    alive = 0.0
    forward = [("begin", passed.begin), *(("forward", passed.block),) * blocks, ("loss", passed.head)]
    for name, phase in forward:
        gathered = _gathered(load, engine, name)
        terms = {"activations": alive + phase.peak, "gradients": before, "gathered": gathered}
        terms |= {"teacher": load.teaching.signal, "loss": load.loss if name == "loss" else 0}
        yield name, terms
        alive += phase.kept
    done = 0.0
    back = [
        ("loss back", passed.head_back),
        *(("backward", passed.block_back),) * blocks,
        ("end", passed.end),
    ]
    for name, phase in back:
        terms = _back(load, engine, phase, done, total, is_last=name == "end")
        terms["activations"] = max(alive + phase.peak - phase.gradient, 0.0)
        if before:
            terms["gradients"] = before + phase.gradient
        terms |= {"teacher": load.teaching.signal, "gathered": _gathered(load, engine, name)}
        yield name, terms
        alive += phase.kept
        done += phase.gradient


def _back(
    load: Load, engine: Engine, phase: Phase, done: float, total: float, *, is_last: bool
) -> dict[str, float]:
    """Gradients and their buffers in one phase of the backward pass, ``done`` bytes of them behind it."""
    own = phase.gradient
    if engine.kind == "fsdp":
        late = load.passed.head_back.gradient if load.units.is_tied and done else 0.0
        return {"gradients": late + (done - late) / engine.shards + own}
    if engine.has_views:
        return {"gradients": own}
    if not engine.is_zero:
        return {"gradients": done + own}
    bucket = ITEM * engine.bucket
    flushed = done - done % bucket
    # What is in a bucket is laid out once more when it is reduced.
    copy = min(bucket, total) if is_last or flushed or done + own >= bucket else 0
    if engine.kind == "zero3":
        return {"gradients": own, "buffers": copy}
    return {"gradients": flushed / engine.shards + own, "buffers": bucket + copy}


def _gathered(load: Load, engine: Engine, name: str) -> float:
    """Weights that are whole for a phase, beyond the part that is kept."""
    units = load.units
    if engine.kind == "zero3":
        return float(ITEM * load.gathered[name])
    if engine.kind != "fsdp":
        return 0.0
    whole = {
        "begin": units.embedding,
        "loss": 2 * units.tail,
        "loss back": units.tail,
        "end": units.embedding,
    }
    outside = whole.get(name, 0)
    if units.is_tied:  # nothing tells when the embedding is done with, so all of it stays till the end
        outside = units.tail * (2 if name == "begin" else 1)
    return float(ITEM * (outside + WHOLE_BLOCKS[name] * units.block))


def stepping(load: Load, engine: Engine) -> tuple[str, dict[str, float]]:
    """The optimiser's step, when there are all gradients and no activations."""
    if engine.offloads:
        return "step", {"gradients": gradient_bytes(load.held, engine) if engine.kind != "zero3" else 0}
    gradients = gradient_bytes(load.held, engine)
    making = stepping_bytes(load.held, engine, load.optimizer, load.device)
    twice = {"zero1": 2, "zero2": 2, "zero3": 1}.get(engine.kind, 1)  # laid out as one tensor once more
    kept = 0 if engine.has_views else twice * gradients
    return "step", {"gradients": kept, "buffers": making}


def loss_inside(
    tokens: int, vocabulary: int, width: int, *, device: str, precision: str, teaches: bool
) -> int:
    """Bytes that a fused loss holds inside of itself: logits of some tokens, and what it makes of them.

    Args:
        tokens: that are predicted.
        vocabulary: of the output projection.
        width: of the hidden states.
        device: ``cpu`` or ``cuda``.
        precision: that the model computes in; another than fp32 takes a narrow copy of the projection.
        teaches: whether a teacher's logits are there too.
    """
    if not vocabulary:
        return 0
    chunk, block = (min(tokens, of(vocabulary, device)) for of in (chunk_tokens, block_tokens))
    # Of a cross entropy the last block's probabilities are there till the next one's are.
    models, looked_at = (2, BLOCK_COPIES * block) if teaches else (1, min(2 * block, chunk))
    narrow = 0 if precision == "fp32" else 2 * vocabulary * (width + models * chunk)
    return 4 * (vocabulary * (models * chunk + looked_at) + chunk * width) + narrow
