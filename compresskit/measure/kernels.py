"""The records of packed kernels as a table, and the benchmark that makes them. No torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import compresskit
from compresskit.errors import Fault, InputError, WorkerError
from compresskit.measure.record import Record, read_records

KIND = "kernels-cpu"
DAY = len("2030-01-31")
PROJECT = Path(compresskit.__file__).parents[1]

HEADINGS = (
    "shape",
    "zeros",
    "batch",
    "candidate",
    "ms",
    "quartiles",
    "GB/s",
    "x dense",
    "x torch bf16",
    "x torch int8",
    "limit",
    "of limit",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` of a record of kind ``kernels-cpu``, aligned; what does not apply is a dash.

    Args:
        rows: with the keys ``shape``, ``zeros``, ``tokens``, ``candidate``, ``ms`` (its three quartiles),
            ``GB_per_s``, ``ratio``, ``over_torch_bf16``, ``over_torch_int8``, ``limit``, ``limit_fraction``,
            the last two of a batch of one alone.

    Returns:
        A line for each row, below the headings.
    """
    lines = [HEADINGS, *(_line(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < 4 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    first, median, third = row["ms"]
    alone = row["tokens"] == 1  # bytes of the weight bound no product that reads it once for many tokens
    limit, fraction = (row["limit"], row["limit_fraction"]) if alone else (None, None)
    return (
        row["shape"],
        row["zeros"] if ":" in row["zeros"] else f"{float(row['zeros']):.0%}",
        str(row["tokens"]),
        row["candidate"],
        f"{median:.3f}",
        f"{first:.3f} to {third:.3f}",
        f"{row['GB_per_s']:.1f}",
        *(_ratio(row[name]) for name in ("ratio", "over_torch_bf16", "over_torch_int8")),
        _ratio(limit),
        "-" if fraction is None else f"{fraction:.0%}",
    )


def _ratio(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def recorded(files: Sequence[Path] = ()) -> str:
    """The records of the newest day in ``files``, or in the project's results, as text, in their order.

    Raises:
        InputError: there is none.
    """
    results = PROJECT / "benchmarks" / "results"
    places = files or sorted(results.glob(f"{KIND}-*.json"))
    records = [record for path in places for record in read_records(path) if record.kind == KIND]
    if not records:
        got = ", ".join(map(str, files)) or f"none in {results}"
        cure = "Make one with --run, in a checkout of the project."
        raise InputError(Fault("kernels", f"a record of kind {KIND}", got, cure))
    last = max(record.measured_at for record in records)
    shown = [record for record in records if record.measured_at[:DAY] == last[:DAY]]
    return "\n\n".join(map(_told, sorted(shown, key=lambda record: record.measured_at)))


def _told(record: Record) -> str:
    where = f"{record.processor}, {record.threads} threads, {record.measured_at}"
    return "\n".join([where, *record.notes, table(record.values["rows"])])


def run() -> str:
    """Time the kernels now, which takes minutes, and append the record; what is printed meanwhile is shown.

    Raises:
        InputError: the benchmark is not here; it comes with a checkout, not with the installed package.
        WorkerError: it failed.
    """
    script = PROJECT / "benchmarks" / "kernels" / "cpu.py"
    if not script.is_file():
        cure = "Run it in a checkout of the project."
        raise InputError(Fault("kernels --run", "the project's benchmarks", f"no {script}", cure))
    command = [sys.executable, "-m", "benchmarks.run", "kernels.cpu"]
    done = subprocess.run(command, cwd=PROJECT, check=False)
    if done.returncode:
        cure = "See its output above."
        raise WorkerError(Fault("benchmarks.run kernels.cpu", "exit code 0", str(done.returncode), cure))
    return recorded()
