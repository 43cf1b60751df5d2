"""How long a step takes: products at a share of the device's peak, bytes over links, and what of them shows.

Only what grows with the model is counted: products of matrices and of attention, gradients and weights that
processes send each other, and the optimiser's reading and writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compresskit.foresight.devices import GB, HOST_LINK_BYTES_S, Device, Machine
from compresskit.foresight.states import ITEM, Engine, Held, numbers
from compresskit.modeling.anatomy import Anatomy
from compresskit.training.rules.asynchronous import ZENFLOW
from compresskit.training.rules.zenflow import SELECTED

FORWARD, WHOLE = 1, 3
"""Products of a forward pass, and of that with its backward pass: for inputs and for weights."""
FROZEN = 2
"""The same where weights take no gradient."""
STEP_TRAFFIC = 7
"""Numbers that AdamW reads or writes for a weight: it, its gradient and both moments, three of them twice."""
EXCHANGE_TRAFFIC = {"local_sgd": 6, "diloco": 20}
"""The same of an exchange: laid out, divided and put in place, each read and written. Of DiLoCo also the
difference to the outer weight, 3, and the outer SGD with Nesterov's momentum, 11 as torch does it."""
CPU_BYTES_S = 10 * GB
"""That a process's Adam on the CPU reads and writes: of a server's memory, some 80 GB/s, an eighth."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs, in floating-point operations.

    Attributes:
        blocks: of the student's blocks forward.
        head: of its output projection forward.
        teacher: of a whole teacher forward.
        gathered_bytes: of a teacher whose weights are divided, in each pass.
        ways: ranks that share each layer of the blocks.
        exchanged_bytes: added up over these, of each token.
        head_bytes: gathered from these in each pass.
    """

    blocks: float
    head: float
    teacher: float = 0.0
    gathered_bytes: float = 0.0
    ways: int = 1
    exchanged_bytes: float = 0.0
    head_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How long an optimiser step takes.

    Attributes:
        compute_s: of products.
        communication_s: of all bytes sent.
        exposed_s: of these what no computing hides.
        step_s: of the optimiser.
        tokens_s: that all processes together train on in a second.
    """

    compute_s: float
    communication_s: float
    exposed_s: float
    step_s: float
    tokens_s: float

    @property
    def total_s(self) -> float:
        """Of one step."""
        return self.compute_s + self.exposed_s + self.step_s


def flops_of(anatomy: Anatomy, config: Any, tokens: int) -> tuple[float, float]:
    """Of one token forward, in the blocks and in the output projection.

    Args:
        anatomy: of the model.
        config: its configuration.
        tokens: of a row, each of which looks at all of it.
    """
    blocks = sum(2.0 * n.out_features * n.in_features for n in anatomy.linears.values() if n.block)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0) or 0
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    blocks += len(anatomy.blocks) * 4.0 * tokens * heads * width
    head = anatomy.linears.get(anatomy.head or "")
    return blocks, 2.0 * head.out_features * head.in_features if head else 0.0


def pace(
    work: Work,
    engine: Engine,
    held: Held,
    machine: Machine,
    *,
    precision: str,
    rows: int,
    passes: int,
    tokens: int,
    recomputed: float,
) -> Pace:
    """Of one optimiser step.

    Args:
        work: of a token.
        engine: that trains.
        held: parameters.
        machine: where.
        precision: that products run in.
        rows: of one pass of one process.
        passes: of a step.
        tokens: of a row.
        recomputed: share of the blocks that are computed once more in the backward pass.
    """
    device = machine.device
    each = rows * tokens
    factor = FROZEN if held.frozen or held.packed_bytes or held.whole_bytes else WHOLE
    flops = work.blocks * (factor + recomputed) / work.ways + work.head * WHOLE + work.teacher
    second = device.peak_flops[precision] * device.efficiency
    compute = passes * each * flops / second
    step = _stepping_s(engine, held, device)
    sent, hides = _sent(engine, held, machine, passes, work.ways)
    if engine.is_alone:  # a step's share of an exchange, which a delay's steps hide
        exposed = max(0.0, sent - engine.delay * (compute + step) / engine.every)
    else:
        exposed = max(0.0, sent - 0.5 * compute) if hides else sent
    if work.ways > 1:  # each layer waits for the one before
        whole = 2 * each * work.exchanged_bytes + work.head_bytes
        splitting = passes * _ring(whole, work.ways, machine)
        sent, exposed = sent + splitting, exposed + splitting
    if work.gathered_bytes:  # the next block is gathered while one computes
        gathering = passes * _ring(work.gathered_bytes, machine.processes, machine)
        exposed += max(0.0, gathering - passes * each * work.teacher / second)
        sent += gathering
    total = compute + exposed + step
    return Pace(compute, sent, exposed, step, passes * each * (machine.processes // work.ways) / total)


def _stepping_s(engine: Engine, held: Held, device: Device) -> float:
    """Seconds of the optimisers in a step, and of copies to the host and back where one steps there."""
    everything = numbers(held.trained)
    stepped = engine.part(held.trained) if engine.shards > 1 else everything
    copy, on_cpu = ITEM * stepped / HOST_LINK_BYTES_S, ITEM * STEP_TRAFFIC * stepped / CPU_BYTES_S
    if engine.synchronise == ZENFLOW:
        # The device sums up gradients, but the sum lies on the host: each step writes it, all but the first
        # read it; of the last Adam gets a copy, and its weights come back. Of n steps 2 n + 1 copies.
        copies = (2 * engine.every + 1) * copy
        return step_s(SELECTED * everything, device) + (copies + on_cpu) / engine.every
    if engine.is_alone:
        exchange = ITEM * EXCHANGE_TRAFFIC[engine.synchronise] * everything / device.memory_bytes_s
        return step_s(stepped, device) + exchange / engine.every
    return step_s(stepped, device) + (2 * copy + on_cpu if engine.offloads else 0.0)


def step_s(stepped: float, device: Device) -> float:
    """Seconds in which an optimiser looks at so many numbers."""
    return ITEM * STEP_TRAFFIC * stepped / device.memory_bytes_s


def _sent(engine: Engine, held: Held, machine: Machine, passes: int, ways: int) -> tuple[float, bool]:
    """Seconds that a step's communication takes, and whether computing hides it; not that of split layers."""
    trained = ITEM * numbers(held.trained)
    everything = trained + ITEM * numbers(held.frozen) + held.packed_bytes
    count = machine.processes // ways
    if count == 1:
        return 0.0, True
    if engine.kind == "ddp":
        return 2 * _ring(trained, count, machine) / (engine.every if engine.is_alone else 1), True
    if engine.kind == "fsdp":
        copies, group = count // engine.shards, engine.shards
        gather = 2 * _ring(everything, group, machine, ways)  # once forward, once back
        reduce = _ring(trained, group, machine, ways)
        # Copies of the group add up their shares once a step, all pairs at once over the nodes' links.
        between = 2 * (copies - 1) / copies * ways * trained / machine.link_bytes_s if copies > 1 else 0.0
        return passes * gather + reduce + between, True
    if engine.kind == "zero3":
        return passes * (2 * _ring(everything, count, machine) + _ring(trained, count, machine)), False
    reductions = passes if engine.kind == "zero2" else 1
    # Of ZenFlow each step gathers the gradients of the chosen columns, and the last of n the weights.
    gathers = SELECTED + 1 / engine.every if engine.synchronise == ZENFLOW else 1
    return (reductions * 2 + gathers) * _ring(trained, count, machine), False


def _ring(whole: float, count: int, machine: Machine, abreast: int = 1) -> float:
    """Seconds in which ``count`` processes gather or reduce so many bytes, ``abreast`` neighbours others."""
    inside = count * abreast <= machine.gpus
    between = min(machine.device.link_bytes_s, machine.link_bytes_s / abreast)
    rate = machine.device.link_bytes_s if inside else between
    return whole * (count - 1) / count / rate
