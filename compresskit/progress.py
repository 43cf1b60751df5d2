"""Progress with a remaining time: a redrawn bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TextIO, TypeVar

T = TypeVar("T")
BAR_CELLS = 24
REDRAW_S = 0.1
LINE_S = 10.0


def clock(seconds: float) -> str:
    """``seconds`` as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Bytes for people: ``3.42 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class Progress:
    """One long operation of ``total`` units, shown on ``stream`` (standard error by default).

    Use as a context manager; call :meth:`advance` as units are done. On a terminal one line
    is redrawn; elsewhere a line is printed at the start, every 10 seconds and at the end.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str = "",
        done: int = 0,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._note = ""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._now = now
        self._start = self._shown = now()

    def __enter__(self) -> Progress:
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._show(last=True)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count ``units`` more as done; ``note`` (a loss, a layer) replaces the last one."""
        self.done += units
        self._note = note or self._note
        if self._now() - self._shown >= (REDRAW_S if self._is_terminal else LINE_S):
            self._show()

    def _show(self, last: bool = False) -> None:
        self._shown = self._now()
        elapsed = self._shown - self._start
        fresh = self.done - self._first
        text = f"{self.title} {self.done}/{self.total} {self.unit}".rstrip()
        if last:
            text += f" in {clock(elapsed)}"
        elif fresh:
            text += f", {clock(elapsed / fresh * (self.total - self.done))} left"
        text += f"  {self._note}" if self._note else ""
        if self._is_terminal:
            filled = BAR_CELLS * self.done // max(self.total, 1)
            bar = "#" * filled + "-" * (BAR_CELLS - filled)
            self._stream.write(f"\r\x1b[K[{bar}] {text}" + ("\n" if last else ""))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def say(text: str) -> None:
    """One line of what a user waits to know, where progress is shown."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def with_progress(items: Sequence[T], title: str, *, unit: str = "") -> Iterator[T]:
    """Each of ``items``, counted as done once the next is asked for."""
    with Progress(title, len(items), unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()
