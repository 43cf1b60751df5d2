"""Progress on a terminal and off it, with a clock of our own."""

from __future__ import annotations

import io

from compresskit.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_clock() -> None:
    assert [clock(s) for s in (0, 61, 3725.4)] == ["0:00", "1:01", "1:02:05"]


def test_a_terminal_gets_one_line_redrawn_with_the_time_left() -> None:
    out, times = Terminal(), iter(range(100))
    with Progress("Pruning", 4, unit="blocks", stream=out, now=lambda: next(times)) as bar:
        bar.advance(1, "layer 0")
    shown = out.getvalue()
    assert "Pruning 1/4 blocks" in shown
    assert "left" in shown
    assert "layer 0" in shown
    assert shown.count("\n") == 1


def test_a_pipe_gets_plain_lines_and_not_too_many() -> None:
    out, times = io.StringIO(), iter(x / 10 for x in range(10_000))
    with Progress("Training", 1000, stream=out, now=lambda: next(times)) as bar:
        for _ in range(1000):
            bar.advance()
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 25
    assert lines[0] == "Training 0/1000"
    assert "Training 1000/1000 in " in lines[-1]
    assert "\r" not in out.getvalue()
