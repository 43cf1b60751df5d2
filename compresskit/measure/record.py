"""Record: one measurement as JSON, checked when it is read. No torch.

The name of every value ends in its unit where it has one: ``_bytes``, ``_ms``, ``_fraction``; a value with
quartiles is their median.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

from compresskit.artifact import write_json
from compresskit.errors import Fault, InputError
from compresskit.timing import processor

Json = Any

SCHEMA = "compresskit.record/1"
PACKAGES = ("compresskit", "torch", "transformers", "compressed-tensors", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One measurement of one subject, with everything needed to repeat it.

    Attributes:
        kind: what was measured: ``size``, ``quality``, ``latency``, ``memory``, or a benchmark's name.
        subject: of what: ``original``, ``1-prune``, ``artifact``.
        values: name with unit -> number, text or None; numbers are medians where ``quartiles`` has the name.
        quartiles: name -> (first quartile, median, third quartile) over the repetitions.
        settings: what was chosen, e.g. ``{"context_length": 512}``.
        notes: full sentences a reader of the figures has to know.
        versions: package -> version, and ``python``.
        device: ``cpu`` or the accelerator's name.
        processor: name of the CPU and its number of cores.
        threads: of one operation on the CPU.
        seed: of anything drawn at random.
        repetitions: that the quartiles were taken over; 1 where nothing varies.
        measured_at: UTC, ISO 8601, to the second.
        schema: version of this layout.
    """

    kind: str
    subject: str
    values: Mapping[str, Json]
    quartiles: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    device: str = "cpu"
    processor: str = field(default_factory=processor)
    threads: int = 1
    seed: int = 0
    repetitions: int = 1
    measured_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    schema: str = SCHEMA

    def to_json(self) -> dict[str, Json]:
        """The record as plain data; :func:`record_from` is its inverse."""
        return {**asdict(self), "notes": list(self.notes)}


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of ``samples``, interpolated linearly between them."""
    if len(samples) == 1:
        return (samples[0], samples[0], samples[0])
    first, median, third = quantiles(samples, n=4, method="inclusive")
    return (first, median, third)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """The installed version of each of ``packages`` and of Python; ``not installed`` where it is not."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if found.get("compresskit") == "not installed":
        found["compresskit"] = "from source"
    return found


def read_records(path: Path) -> list[Record]:
    """Read and check the records of one file.

    Args:
        path: of a JSON file that holds one record or a list of them.

    Returns:
        The records, in the file's order.

    Raises:
        InputError: unreadable, not JSON, or not records; every fault of a record together.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            Fault(str(path), "records in JSON", str(error), "Measure again, or take the file away.")
        ) from error
    if isinstance(data, list):
        return [record_from(item, f"{path}[{index}]") for index, item in enumerate(data)]
    return [record_from(data, str(path))]


def write_records(records: Iterable[Record], directory: Path) -> list[Path]:
    """Write the records of each subject as ``<subject>.json`` into ``directory``, whole or not at all.

    Args:
        records: of any subjects.
        directory: made if it is not there; a subject's older file is replaced.

    Returns:
        The paths written.
    """
    by_subject: dict[str, list[Record]] = {}
    for record in records:
        by_subject.setdefault(record.subject, []).append(record)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for subject, group in by_subject.items():
        paths.append(directory / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', subject)}.json")
        write_json(paths[-1], [record.to_json() for record in group])
    return paths


def record_from(data: Json, where: str) -> Record:
    """Build a record from plain data, checking every field.

    Args:
        data: what :meth:`Record.to_json` returned, or JSON made from it.
        where: the file, for errors.

    Returns:
        The record.

    Raises:
        InputError: a field is missing, unknown or of the wrong type; every fault together.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema", "no schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            Fault(where, f"a record of schema {SCHEMA}", str(got), "Measure again with this version.")
        )
    faults = []
    for name, (expected, is_right) in FIELD_CHECKS.items():
        if name not in data:
            faults.append(Fault(f"{where} {name}", expected, "nothing", "Measure again."))
        elif not is_right(data[name]):
            faults.append(Fault(f"{where} {name}", expected, repr(data[name])[:80], "Measure again."))
    for name in sorted(data.keys() - FIELD_CHECKS.keys()):
        faults.append(Fault(f"{where} {name}", "a field of a record", repr(name), "Take it out."))
    if not faults:
        faults += _quartile_faults(data, where)
    if faults:
        raise InputError(*faults)
    return Record(**{**data, "notes": tuple(data["notes"])})


def _quartile_faults(data: Mapping[str, Json], where: str) -> list[Fault]:
    """Quartiles must be in order and their median must be the value itself."""
    faults = []
    for name, three in data["quartiles"].items():
        value = data["values"].get(name)
        if not (three[0] <= three[1] <= three[2] and value == three[1]):
            expected = "first quartile <= median = the value <= third quartile"
            got = f"{list(three)} and value {value!r}"
            faults.append(Fault(f"{where} quartiles.{name}", expected, got, "Measure again."))
    return faults


def _is_text(value: Json) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(least: int) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_map(of: Callable[[Json], bool]) -> Callable[[Json], bool]:
    return lambda value: isinstance(value, Mapping) and all(_is_text(k) and of(v) for k, v in value.items())


def _is_list(of: Callable[[Json], bool], length: int | None = None) -> Callable[[Json], bool]:
    return lambda value: (
        isinstance(value, list | tuple) and length in (None, len(value)) and all(map(of, value))
    )


def _is_plain(value: Json) -> bool:
    if value is None or isinstance(value, str | bool | int | float):
        return True
    return _is_list(_is_plain)(value) or _is_map(_is_plain)(value)


FIELD_CHECKS: Mapping[str, tuple[str, Callable[[Json], bool]]] = {
    "kind": ("a non-empty text", _is_text),
    "subject": ("a non-empty text", _is_text),
    "values": ("a mapping of names to plain values", _is_map(_is_plain)),
    "quartiles": ("a mapping of names to three numbers", _is_map(_is_list(_is_number, 3))),
    "settings": ("a mapping of names to plain values", _is_map(_is_plain)),
    "notes": ("a list of texts", _is_list(_is_text)),
    "versions": ("a mapping of packages to versions", _is_map(_is_text)),
    "device": ("a non-empty text", _is_text),
    "processor": ("a non-empty text", _is_text),
    "threads": ("a whole number of at least 1", _is_count(1)),
    "seed": ("a whole number of at least 0", _is_count(0)),
    "repetitions": ("a whole number of at least 1", _is_count(1)),
    "measured_at": (
        "a UTC time like 2030-01-31T12:00:00Z",
        lambda value: _is_text(value) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", value) is not None,
    ),
    "schema": (SCHEMA, _is_text),
}
if FIELD_CHECKS.keys() != {f.name for f in fields(Record)}:  # a new field without a check is a defect
    raise AssertionError("FIELD_CHECKS and Record differ")
