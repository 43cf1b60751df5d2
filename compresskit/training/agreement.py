"""Ranks that would train apart are refused at the start: other recipes, data or packages, or another disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from compresskit.errors import Fault, OutputError, PlanError
from compresskit.training.ranks import Ranks

SEEN_S = 30.0
"""Seconds in which a shared file system shows a file to every machine."""
POLL_S = 0.2
NONE = "none"
SHOWN = 60
"""Characters of a value in an error."""


def require_same(ranks: Ranks, name: str, facts: Mapping[str, str]) -> None:
    """Compare ``facts`` over all ranks; every rank calls it and raises the same.

    Args:
        ranks: of the launch.
        name: of the matter.
        facts: what it is about -> its value, such as a digest or a version.

    Raises:
        PlanError: some differ; which, and on which ranks.
    """

    def judge(values: Sequence[str]) -> str:
        return json.dumps([asdict(fault) for fault in _differences(ranks, [json.loads(v) for v in values])])

    faults = [Fault(**fault) for fault in json.loads(ranks.judged(name, json.dumps(dict(facts)), judge))]
    if faults:
        raise PlanError(*faults)


def _differences(ranks: Ranks, said: Sequence[Mapping[str, str]]) -> list[Fault]:
    """One fault for each fact that is not on every rank as on rank 0, and each other value it has."""
    faults = []
    for fact in dict.fromkeys(fact for facts in said for fact in facts):
        at: dict[str, list[int]] = {}
        for rank, facts in enumerate(said):
            at.setdefault(facts.get(fact, NONE), []).append(rank)
        true = said[0].get(fact, NONE)
        for value, where in at.items():
            if value != true:
                expected = f"{_short(true)}, as on {ranks.named(at[true])}"
                got = f"{_short(value)} on {ranks.named(where)}"
                cure = "Start the same command on all, with the same recipe, data and versions of packages."
                faults.append(Fault(fact, expected, got, cure))
    return faults


def _short(value: str) -> str:
    return value if len(value) <= SHOWN else value[: SHOWN - 3] + "..."


def require_shared(ranks: Ranks, folder: Path, name: str) -> None:
    """Refuse a ``folder`` that is not one and the same for all ranks, wherever they run.

    Args:
        ranks: of the launch; every rank calls it and raises the same.
        folder: to write to; exists on rank 0.
        name: of the matter.

    Raises:
        OutputError: some ranks do not see in it what rank 0 writes.
    """
    nonce = ranks.told(f"{name} nonce", uuid4().hex)
    probe = folder / f".compresskit-probe-{nonce}"
    try:
        if ranks.rank == 0:
            probe.write_text(nonce, encoding="utf-8")
        ranks.told(f"{name} written", "")
        blind = ranks.judged(f"{name} seen", "" if _sees(probe, nonce) else str(folder), _blind)
        if blind:
            where = ranks.told(f"{name} who", ranks.named(json.loads(blind)) if ranks.rank == 0 else "")
            expected = "one directory on a file system that all machines share"
            cure = "Give -o a directory of a shared file system, by the same path on every machine."
            got = f"another directory, or none, on {where}"
            raise OutputError(Fault(str(folder), expected, got, cure))
    finally:
        if ranks.rank == 0:
            probe.unlink(missing_ok=True)


def _blind(values: Sequence[str]) -> str:
    blind = [rank for rank, value in enumerate(values) if value]
    return json.dumps(blind) if blind else ""


def _sees(probe: Path, nonce: str) -> bool:
    """Whether the file is there; some file systems show it late, and sooner to who lists its directory."""
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            os.listdir(probe.parent)
            if probe.read_text(encoding="utf-8") == nonce:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
