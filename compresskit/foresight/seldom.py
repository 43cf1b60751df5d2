"""A hint where ranks would step faster if they exchanged weights seldom: another algorithm, so no row."""

from __future__ import annotations

from dataclasses import replace

from compresskit.foresight.candidates import Row, best, candidates
from compresskit.foresight.devices import Machine
from compresskit.foresight.subject import Subject
from compresskit.progress import size
from compresskit.training.rules.asynchronous import EVERY_STEP

HINTED = "diloco"
"""Of the ways to exchange seldom the one for long intervals."""
WORTH = 0.2
"""Of a step's time: what has to be gained, or it is no reason to learn by another algorithm."""


def seldom_hint(subject: Subject, machine: Machine, chosen: Row | None) -> tuple[str, ...]:
    """What to say; nothing where seldom exchange is asked for already, refused, too large or gains little.

    Args:
        subject: the stage.
        machine: where, with the links that were stated.
        chosen: the row to recommend; None where none fits.
    """
    stage = subject.stage
    if stage.synchronise != EVERY_STEP or chosen is None or chosen.pace is None:
        return ()
    other = replace(subject, stage=replace(stage, synchronise=HINTED))
    seldom = best(candidates(other, machine))
    if seldom is None or seldom.pace is None or seldom.peak is None:
        return ()
    now, then = chosen.pace, seldom.pace
    if then.total_s > (1 - WORTH) * now.total_s:
        return ()
    return (
        f"On these links a step waits {now.exposed_s:.3g} s for others. With strategy ddp, "
        f"`synchronise: {HINTED}` and `synchronise_every: {stage.synchronise_every}` it would take "
        f"{then.total_s:.3g} s in place of {now.total_s:.3g} s, and a process {size(seldom.peak.bytes)}. "
        "That is another algorithm: compare losses.",
    )
