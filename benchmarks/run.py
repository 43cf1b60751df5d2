"""Run a benchmark by name, and keep what it found.

    python -m benchmarks.run NAME [options of benchmarks/NAME.py]

Each result is appended as a record to ``benchmarks/results/NAME-DATE.json``; a record once written is never
edited, and losses stay beside wins.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compresskit.artifact import write_json
from compresskit.errors import Fault, InputError
from compresskit.measure.record import Record, read_records, record_from
from compresskit.registry import nearest
from compresskit.timing import default_threads

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def append_record(
    name: str,
    values: Mapping[str, Any],
    *,
    subject: str,
    results: Path = RESULTS,
    **fields: Any,
) -> Path:
    """Append one record to today's file of benchmark ``name``.

    Args:
        name: of the benchmark; letters, digits and dashes.
        values: what was found, names with units.
        subject: what it was found of.
        results: folder of the files.
        fields: further fields of the record: ``quartiles``, ``settings``, ``device``, ``repetitions`` ...

    Returns:
        The file's path.

    Raises:
        InputError: the name is no file name, the values are not plain data, or the file was damaged.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise InputError(Fault("benchmark", "letters, digits and dashes", repr(name), "Rename it."))
    load = {"load_average": round(os.getloadavg()[0], 2)}
    fields = {"threads": default_threads(), **fields, "settings": {**load, **fields.get("settings", {})}}
    record = Record(kind=name, subject=subject, values=values, **fields)
    record_from(json.loads(json.dumps(record.to_json())), f"benchmark {name}")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"
    older = read_records(path) if path.exists() else []
    write_json(path, [r.to_json() for r in (*older, record)])
    return path


def settings_of(
    options: argparse.Namespace, places: Sequence[str], named: Sequence[str] = ()
) -> dict[str, Any]:
    """What was asked for, for a record: without ``places`` of this machine, ``named`` by their last part."""
    settings = {name: value for name, value in vars(options).items() if name not in places}
    return settings | {name: Path(getattr(options, name)).name for name in named}


def benchmarks() -> list[str]:
    """Names of the benchmarks here, folders of them included (``kernels.linear_kl``), but for their parts."""
    found = (p.relative_to(HERE).with_suffix("").parts for p in HERE.rglob("*.py"))
    return sorted(".".join(parts) for parts in found if parts[0] != "peers" and parts[-1] != "run")


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark that the first argument names with the arguments after it."""
    known = benchmarks()
    if not arguments or arguments[0] not in known:
        got = arguments[0] if arguments else "nothing"
        near = nearest(got, known) if known else "none yet"
        print(Fault("benchmarks.run", "the name of a benchmark", got, f"Known: {near}."), file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"benchmarks.{arguments[0]}", *arguments[1:]]
    runpy.run_module(f"benchmarks.{arguments[0]}", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
