"""What the ranks of a launch know of each other beside their collectives: who is there, failed or is lost.

A collective waits half an hour for a rank that never comes, and some engines for ever. So each rank says
every few seconds, over the store of the launch, that it lives. Rank 0 looks at all of them, the others at
rank 0 and at one failure that is posted, so that the traffic grows with the ranks, not with their square.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from compresskit.errors import CompressKitError, Fault, WorkerError
from compresskit.training.launch import note_failure, noted_in
from compresskit.training.setting import launched_processes, this_rank

BEAT_S = 2.0
LOST_S = float(os.environ.get("COMPRESSKIT_LOST_S", "45"))
"""Seconds of silence after which a rank is lost; a slow disk may silence one for as long as it reads."""
JOIN_S = 600.0
"""Seconds that ranks may start apart: one may have a model to fetch first."""
GRACE_S = 5.0
"""Seconds that a rank has to stop by itself once another is lost."""
POLL_S = 0.1
LEFT = "left"
TRANSPORTS = ("gloo", "NCCL", "Connection", "TCPStore", "Timed out")
"""Words in the errors of collectives whose partner is gone."""
CURE = "Start the same command again: it continues at the last complete checkpoint, as --max-restarts does."


class Ranks:
    """The ranks of this launch, as one of them sees them; made by :func:`accompanied`.

    Attributes:
        rank: of this process.
        processes: all.
    """

    def __init__(self, stores: tuple[Store, Store], rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self._store, self._heart = stores  # a client waits for one answer at a time: each thread has its own
        self._lost: Fault | None = None
        self._is_ending = threading.Event()
        self._is_told = False
        self._hosts: list[str] = []
        self._matters = 0
        self._thread = threading.Thread(target=self._live, name="ranks", daemon=True)

    def check(self) -> None:
        """Raise WorkerError if another rank failed or was lost."""
        if self._lost is not None:
            self._is_told = True
            raise WorkerError(self._lost)

    def judged(self, name: str, mine: str, judge: Callable[[Sequence[str]], str]) -> str:
        """Rank 0's judgement of what all ranks say.

        Args:
            name: of the matter; every rank asks of the same matters in the same order.
            mine: what this rank says.
            judge: called on rank 0 with what each says, in the order of ranks.

        Returns:
            What rank 0's ``judge`` returned.

        Raises:
            WorkerError: a rank failed, ended or was lost before it said anything, or asks of another matter.
        """
        self._matters += 1
        place = f"matter {self._matters}"
        self._store.set(f"{place}/{self.rank}", json.dumps([name, mine]))
        if self.rank == 0:
            said = [f"{place}/{rank}" for rank in range(self.processes)]
            self._wait(said, range(self.processes))
            names, values = zip(*map(json.loads, self._store.multi_get(said)), strict=True)
            other = next((rank for rank in range(self.processes) if names[rank] != name), None)
            answer = [None, judge(values)] if other is None else [other, names[other]]
            self._store.set(f"{place}/judged", json.dumps(answer))
        self._wait([f"{place}/judged"], (0,))
        apart, told = json.loads(self._store.get(f"{place}/judged"))
        if apart is not None:
            where = f"training process {apart} of {self.processes}"
            cure = "Start the same command, or script, on all."
            raise WorkerError(Fault(where, "the same steps as process 0", told, cure))
        return str(told)

    def told(self, name: str, mine: str) -> str:
        """What rank 0 says of ``name``; every rank asks."""
        return self.judged(name, mine if self.rank == 0 else "", lambda values: values[0])

    def named(self, ranks: Sequence[int]) -> str:
        """``ranks 1, 3 (node-b)``; on rank 0 alone, which knows the hosts."""
        hosts = sorted({self._hosts[rank] for rank in ranks})
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({', '.join(hosts)})"

    def _wait(self, keys: list[str], ranks: Sequence[int]) -> None:
        """Until all ``keys`` are there, each set by that of ``ranks`` which has its place."""
        while not self._store.check(keys):
            self.check()
            if self._store.add("gone", 0):
                for rank, key in zip(ranks, keys, strict=True):
                    if self._store.check([f"gone/{rank}"]) and not self._store.check([key]):
                        where = f"training process {rank} of {self.processes} ({self._hosts[rank]})"
                        got = "its end, before it said anything of that"
                        raise WorkerError(Fault(where, "the same steps as all others", got, CURE))
            time.sleep(POLL_S)

    def start(self) -> None:
        """Begin to tell that this rank lives, and wait until all do.

        Raises:
            WorkerError: some never came.
        """
        hello = json.dumps([socket.gethostname(), uuid4().hex])
        deadline = time.monotonic() + JOIN_S
        if self.rank == 0:
            self._join(f"of {self._store.add('company', 1)}")
            self._receive(hello, deadline)
        else:
            self._announce(hello, deadline)
        self._heart.set(f"beat/{self.rank}", "0")
        looked_at = range(self.processes) if self.rank == 0 else (0,)
        self._wait([f"beat/{rank}" for rank in looked_at], looked_at)
        self._thread.start()

    def _join(self, company: str) -> None:
        """A launch that starts anew may keep its store: what an earlier company left there is not ours."""
        bare = [s.underlying_store if isinstance(s, PrefixStore) else s for s in (self._store, self._heart)]
        self._store, self._heart = (PrefixStore(f"compresskit {company}", store) for store in bare)

    def _receive(self, hello: str, deadline: float) -> None:
        """As rank 0: wait for all, and answer each with its own word."""
        self._store.set("hello/0", hello)
        names = [f"hello/{rank}" for rank in range(self.processes)]
        while missing := [rank for rank, name in enumerate(names) if not self._store.check([name])]:
            if time.monotonic() > deadline:
                got = f"{self.processes - len(missing)}; missing: {', '.join(map(str, missing))}"
                raise WorkerError(_never_came(self.processes, got))
            time.sleep(POLL_S)
        hellos = [value.decode() for value in self._store.multi_get(names)]
        self._hosts = [json.loads(value)[0] for value in hellos]
        self._store.set("company", json.dumps(hellos))

    def _announce(self, hello: str, deadline: float) -> None:
        """As another: say so in the newest company until its rank 0 answers."""
        bare, at = self._store, -1
        while True:
            now = bare.add("company", 0)
            if now != at:
                at = now
                self._join(f"of {at}")
                self._store.set(f"hello/{self.rank}", hello)
            if at and self._store.check(["company"]):
                hellos = json.loads(self._store.get("company"))
                if hellos[self.rank] == hello:
                    self._hosts = [json.loads(value)[0] for value in hellos]
                    return
            if time.monotonic() > deadline:
                raise WorkerError(_never_came(self.processes, "no word of rank 0, or not of all"))
            time.sleep(POLL_S)

    def _live(self) -> None:
        """Tell that this rank lives, and look whether the others do, until the end."""
        seen, count = [("", time.monotonic())] * self.processes, 0
        looked_at = range(self.processes) if self.rank == 0 else (0,)
        while not self._is_ending.wait(BEAT_S) and self._lost is None:
            count += 1
            try:
                self._heart.set(f"beat/{self.rank}", str(count))
                if self._heart.add("failures", 0):
                    self._lost = Fault(**json.loads(self._heart.get("failure")))
                    break
                beats = self._heart.multi_get([f"beat/{rank}" for rank in looked_at])
            except RuntimeError:
                if seen[0][0] != LEFT:
                    self._lost = self._silence(0, "its end, or that of the store it keeps")
                break
            now = time.monotonic()
            for rank, beat in zip(looked_at, beats, strict=True):
                if beat.decode() != seen[rank][0]:
                    seen[rank] = (beat.decode(), now)
                elif beat.decode() != LEFT and now - seen[rank][1] > LOST_S:
                    self._lost = self._silence(rank, f"silence for {LOST_S:.0f} s")
                    self._post(self._lost, self._heart)
        if self._lost is not None:
            self._stop(self._lost)

    def _silence(self, rank: int, got: str) -> Fault:
        where = f"training process {rank} of {self.processes} ({self._hosts[rank]})"
        return Fault(where, "a sign of life", f"{got}: it was killed, it hangs, or its machine is lost", CURE)

    def _stop(self, lost: Fault) -> None:
        """End this process, unless it ends by itself: it may wait in a collective for ever."""
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            if self._is_told or self._is_ending.wait(POLL_S):
                return
        error = WorkerError(lost)
        note_failure(error)
        if noted_in() is None:
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    def _post(self, fault: Fault, store: Store) -> None:
        """Have the others learn of a failure; only the first one counts."""
        told = {name: getattr(fault, name) for name in ("where", "expected", "got", "cure")}
        if store.add("posting", 1) == 1:
            store.set("failure", json.dumps(told))
            store.add("failures", 1)

    def explained(self, error: BaseException) -> BaseException:
        """``error``, or why it came about: the transport's complaint is that another rank is gone."""
        self._is_told = True
        if isinstance(error, CompressKitError):
            return error
        if isinstance(error, RuntimeError) and any(word in str(error) for word in TRANSPORTS):
            deadline = time.monotonic() + LOST_S + 2 * BEAT_S
            while self._lost is None and self._thread.is_alive() and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if self._lost is not None:
                return WorkerError(self._lost)
        return error

    def leave(self, error: BaseException | None) -> None:
        """Say goodbye; rank 0, which may keep the store, is the last to go."""
        with suppress(RuntimeError):
            if error is not None and self._lost is None:
                where = f"training process {self.rank} of {self.processes} ({socket.gethostname()})"
                got = f"{type(error).__name__}: {error}".splitlines()[0]
                self._post(Fault(where, "its part of the run", got, "See its own error."), self._store)
            if error is None:  # its silence will be no loss: who waits for it has to look
                self._store.set(f"gone/{self.rank}", "")
                self._store.add("gone", 1)
            if self.rank == 0:
                self._see_off(LOST_S if error is None else 3 * BEAT_S)
        self._is_ending.set()
        if self._thread.ident is not None:
            self._thread.join(2 * BEAT_S)
        with suppress(RuntimeError):
            self._store.set(f"beat/{self.rank}", LEFT)

    def _see_off(self, most_s: float) -> None:
        others = [f"beat/{rank}" for rank in range(1, self.processes)]
        deadline = time.monotonic() + most_s
        while time.monotonic() < deadline and self._store.check(others):
            if all(beat.decode() == LEFT for beat in self._store.multi_get(others)) or self._lost:
                return
            time.sleep(POLL_S)


_here: list[Ranks] = []
_stores: list[tuple[Store, Store]] = []


@contextmanager
def accompanied() -> Iterator[Ranks | None]:
    """The ranks of the launch that this process is one of; None if it is alone.

    While this lasts, a rank that fails, is killed or falls silent ends the others within a minute, by a
    WorkerError that names it. Within another one it is that one.

    Raises:
        WorkerError: ranks never came, or another one failed.
    """
    processes = launched_processes()
    if _here or processes is None or processes == 1 or "MASTER_ADDR" not in os.environ:
        yield _here[0] if _here else None
        return
    if not _stores:
        _stores.append((_client(), _client()))
    ranks = Ranks(_stores[0], this_rank(), processes)
    _here.append(ranks)
    failure: BaseException | None = None
    try:
        ranks.start()
        yield ranks
    except BaseException as error:
        failure = ranks.explained(error)
        if failure is error:
            raise
        raise failure from error
    finally:
        ranks.leave(failure)
        _here.clear()


def _client() -> Store:
    """Of the store that collectives will use, too; rank 0 opens it where no agent has."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    options: dict[str, Any] = {"timeout": timedelta(seconds=JOIN_S), "wait_for_workers": False}
    try:
        store = TCPStore(host, port, None, this_rank() == 0 and not agent, multi_tenant=True, **options)
    except RuntimeError as error:
        raise WorkerError(
            _never_came(launched_processes() or 1, f"no answer from {host}:{port}: {error}".splitlines()[0])
        ) from error
    store.set_timeout(timedelta(seconds=LOST_S))
    return store


def _never_came(processes: int, got: str) -> Fault:
    cure = "See the errors of the others, and whether the machines reach each other."
    return Fault(f"start of {processes} training processes", f"all within {JOIN_S:.0f} s", got, cure)
