"""Report: what was gained and what it cost, from records and manifests alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import Fault, InputError
from compresskit.measure.record import Record
from compresskit.reports.chain import Chain, Step, chain_of, read_chain
from compresskit.reports.figures import figures_of
from compresskit.reports.page import write_page
from compresskit.reports.text import write_markdown, write_table
from compresskit.reports.verdict import findings

Json = Any


@dataclass(frozen=True, slots=True)
class Report:
    """One or more chains, ready to be written in any form; each form says the same."""

    chains: tuple[Chain, ...]

    def html(self) -> str:
        """One self-contained page with pictures; no script, no external request."""
        return write_page(self.chains)

    def markdown(self) -> str:
        """The same in GitHub's Markdown, without the pictures."""
        return "\n".join(write_markdown(chain) for chain in self.chains)

    def table(self) -> str:
        """The figures alone, for a terminal."""
        return "\n\n".join(write_table(chain) for chain in self.chains)

    def json(self) -> str:
        """Everything the report knows, as JSON text; figures under their records' names."""
        return json.dumps([_chain_json(chain) for chain in self.chains], indent=1) + "\n"

    def __str__(self) -> str:
        return self.table()


def build(subjects: Iterable[str | Path | Record]) -> Report:
    """Read what a report needs; measures nothing.

    Args:
        subjects: artifact directories, files or folders of records, and records; the loose records
            together make one chain.

    Returns:
        The report.

    Raises:
        InputError: nothing was given, or something is no artifact and no record.
    """
    if isinstance(subjects, str | Path):
        subjects = [subjects]
    given = list(subjects)
    chains = [read_chain(Path(s)) for s in given if not isinstance(s, Record)]
    if loose := [s for s in given if isinstance(s, Record)]:
        chains.append(chain_of(loose))
    if not chains:
        raise InputError(Fault("report", "an artifact or records", "nothing", "Give a directory or a file."))
    return Report(tuple(chains))


def _chain_json(chain: Chain) -> dict[str, Json]:
    return {
        "title": chain.title,
        "place": chain.place,
        "recipe": chain.recipe,
        "versions": dict(chain.versions),
        "warnings": list(chain.warnings),
        "findings": [asdict(finding) for finding in findings(chain)] if len(chain.steps) > 1 else [],
        "steps": [_step_json(chain, step) for step in chain.steps],
    }


def _step_json(chain: Chain, step: Step) -> dict[str, Json]:
    figures = figures_of(chain)
    return {
        "name": step.name,
        "kind": step.kind,
        "detail": step.detail,
        "fields": dict(step.fields),
        "figures": {f.name: f.value(step) for f in figures},
        "ratios": {f.name: f.ratio(chain, step) for f in figures if f.has_ratio},
        "checks": dict(step.checks),
        "warnings": list(step.warnings),
        "metrics": dict(step.metrics),
        "layers": list(step.layers),
        "seconds": step.seconds,
        "records": [record.to_json() for record in step.records.values()],
    }
