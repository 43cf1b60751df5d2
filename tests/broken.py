"""Training that is broken off, as by a kill or a disk that takes no more, and continued by a second start."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from compresskit.training.trainer import StageTrainer


class Interrupted(Exception):
    """Stands for a kill: nothing catches it."""


@contextmanager
def broken_off_in(step: int) -> Iterator[None]:
    """Whatever trains in the body ends in the forward pass of ``step``, and must get so far."""
    compute = StageTrainer.compute_loss

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            raise Interrupted
        return compute(self, *args, **kwargs)

    with _instead("compute_loss", stop):
        yield


@contextmanager
def broken_off_at_the_end() -> Iterator[None]:
    """The same after the last step."""

    def stop(*_: Any) -> None:
        raise Interrupted

    with _instead("last_evaluation", stop):
        yield


@contextmanager
def _instead(name: str, stop: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, name, stop)
        with pytest.raises(Interrupted):
            yield


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """What this process writes beyond that fails with an OSError, as on a full disk."""
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
        signal.signal(signal.SIGXFSZ, before)
