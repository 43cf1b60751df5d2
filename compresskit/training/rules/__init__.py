"""What does not combine: tables, a file a subject. No torch."""

from compresskit.training.rules import (
    adapters,
    asynchronous,
    deepspeed,
    engine,
    memory,
    mesh,
    offload,
    optimizer,
    overlap,
    pipeline,
    precision,
    shares,
    watching,
    zenflow,
)
from compresskit.training.rules.base import Rule

ROOMS = (
    engine,
    mesh,
    pipeline,
    asynchronous,
    zenflow,
    deepspeed,
    offload,
    overlap,
    optimizer,
    precision,
    memory,
    adapters,
    shares,
    watching,
)
RULES: tuple[Rule, ...] = tuple(rule for room in ROOMS for rule in room.RULES)
