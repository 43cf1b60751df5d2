"""What torch compiles at first use: a process killed in the middle does not stop those that come after."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch.utils.cpp_extension as compiling

from compresskit.training import extensions
from compresskit.training.extensions import Baton, compiled_despite_kills

FORKS = multiprocessing.get_context("fork")


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def hold(lock: Path) -> None:
    Baton(str(lock)).try_acquire()
    time.sleep(60)


def wait_for(there: Path) -> None:
    end = time.monotonic() + 30
    while not there.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_torch_takes_it_for_its_own_only_as_long_as_asked() -> None:
    before = compiling.FileBaton
    with compiled_despite_kills():
        assert compiling.FileBaton is Baton
    assert compiling.FileBaton is before


def test_who_is_killed_while_it_holds_it_stops_nobody(lock: Path) -> None:
    holder = FORKS.Process(target=hold, args=(lock,))
    holder.start()
    wait_for(lock)
    holder.kill()
    holder.join()
    assert lock.exists()
    baton = Baton(str(lock))
    assert baton.try_acquire()
    baton.release()
    assert not lock.exists()


def test_one_process_at_a_time_holds_it(lock: Path) -> None:
    baton = Baton(str(lock))
    baton.try_acquire()
    other = FORKS.Process(target=hold, args=(lock,))
    other.start()
    time.sleep(0.5)
    assert lock.read_text() == "compresskit"
    lock.unlink()
    time.sleep(0.5)
    assert not lock.exists()  # the other one would make it anew
    baton.release()
    wait_for(lock)
    other.kill()
    other.join()


def test_torchs_own_lock_is_waited_for_while_it_compiles(lock: Path) -> None:
    lock.touch()
    waiting = FORKS.Process(target=hold, args=(lock,))
    waiting.start()
    time.sleep(0.5)
    assert lock.read_text() == ""
    lock.unlink()
    wait_for(lock)
    waiting.kill()
    waiting.join()


def test_torchs_own_lock_that_was_left_behind_is_overtaken(lock: Path) -> None:
    lock.touch()
    old = time.time() - extensions.FORGOTTEN_S - 1
    os.utime(lock, (old, old))
    baton = Baton(str(lock))
    assert baton.try_acquire()
    baton.release()
