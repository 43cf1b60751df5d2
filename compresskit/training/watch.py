"""What a training run tells: a progress line while it lasts, and one JSON line per step that stays."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import psutil

from compresskit.kernels.dispatch import used
from compresskit.progress import Progress
from compresskit.training.trackers import Trackers

LOSSES = "losses.jsonl"


class LossLog:
    """``losses.jsonl``: one object per optimiser step, and one per evaluation.

    A step has step, loss (nats per supervised token), learning_rate, grad_norm, tokens (read so far), seconds
    (so far, of this start), kernels (op -> implementation), skipped (fp16 only) and parts (what the objective
    named of its loss, each per supervised token); an evaluation has step and validation_loss. Where the
    batch may grow, each step also has a line of its batch_size and noise_scale_rows (null: no bound).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line cut short by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [record for record in map(_parse, lines) if record is not None]

    def cut_after(self, step: int) -> None:
        """Forget what was written after ``step``, the one a restart continues from; all of it for 0."""
        kept = [record for record in self.read() if 0 < step >= record["step"]]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def losses(self) -> list[float]:
        """The training loss of each step."""
        return [r["loss"] for r in self.read() if "loss" in r]

    def parts(self, last: int) -> dict[str, float]:
        """Part of the loss -> mean over the ``last`` steps."""
        records = [r["parts"] for r in self.read() if "parts" in r][-last:]
        names = sorted({name for parts in records for name in parts})
        return {name: sum(parts[name] for parts in records) / len(records) for name in names}

    def tokens(self) -> int:
        """Read so far, over all starts."""
        return int(next((r["tokens"] for r in reversed(self.read()) if "tokens" in r), 0))

    def seconds(self) -> float:
        """How long the steps of the last start took."""
        return float(next((r["seconds"] for r in reversed(self.read()) if "seconds" in r), 0.0))

    def skipped(self) -> int:
        """Steps that the fp16 loss scaler skipped."""
        return sum(bool(r.get("skipped")) for r in self.read())

    def kernels(self) -> dict[str, str]:
        """Op -> implementation, over all steps, whichever process took them."""
        merged: dict[str, str] = {}
        for record in self.read():
            merged |= record.get("kernels", {})
        return dict(sorted(merged.items()))


def held_bytes(device: str) -> int:
    """What this process holds now: of ``cuda`` what torch has allocated there, else what is resident."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record


class Watch:
    """Writes the loss log and moves the progress line; only the main process has one.

    Args:
        log: where losses go.
        title: of the progress line.
        steps: of the whole run.
        done: steps already behind, after a restart.
        tokens_per_step: input tokens of one optimiser step on the data, over all processes.
        trackers: that are told, too.
        memory_bytes: what this process holds now.
    """

    def __init__(
        self,
        log: LossLog,
        *,
        title: str,
        steps: int,
        done: int,
        tokens_per_step: int,
        trackers: Trackers | None = None,
        memory_bytes: Callable[[], int],
    ) -> None:
        self.log, self.progress = log, Progress(title, steps, unit="steps", done=done)
        self._trackers, self._memory_bytes = trackers, memory_bytes
        self.tokens_per_step, self._since = tokens_per_step, 0
        self._before = log.tokens()
        self._start = time.monotonic()

    def step(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        skipped: bool,
        parts: Mapping[str, float] = MappingProxyType({}),
        tokens: int | None = None,
    ) -> None:
        """One optimiser step is done, of so many ``tokens``; None is one on the data."""
        seconds = time.monotonic() - self._start
        self._since += self.tokens_per_step if tokens is None else tokens
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": self._before + self._since,
            "seconds": round(seconds, 3),
            "kernels": used(),
        }
        if parts:
            record["parts"] = dict(parts)
        self.log.write(record | ({"skipped": True} if skipped else {}))
        rate, memory = self._since / max(seconds, 1e-9), self._memory_bytes()
        agrees = f", {100 * parts['agreement']:.0f}% as the teacher" if "agreement" in parts else ""
        self.progress.advance(1, f"loss {loss:.4f}{agrees}, {rate:,.0f} tokens/s, {memory / 1e9:.2f} GB")
        if self._trackers is not None:
            numbers = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
            numbers |= {"tokens_per_s": rate, "memory_bytes": memory, **parts}
            self._trackers.log(numbers, step)

    def batch(self, step: int, rows: int, noise_scale_rows: float | None) -> None:
        """How many rows a step had that is about to be told, and how large a batch its noise allows."""
        numbers = {"batch_size": rows, "noise_scale_rows": noise_scale_rows}
        self.log.write({"step": step, **numbers})
        if self._trackers is not None:
            self._trackers.log({name: n for name, n in numbers.items() if n is not None}, step)

    def evaluation(self, step: int, loss: float) -> None:
        """One evaluation is done."""
        self.log.write({"step": step, "validation_loss": loss})
        if self._trackers is not None:
            self._trackers.log({"validation_loss": loss}, step)

    def __enter__(self) -> Watch:
        self.progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The run is over, or broken off."""
        self.progress.__exit__(kind, error, trace)
        if self._trackers is not None:
            self._trackers.finish()
