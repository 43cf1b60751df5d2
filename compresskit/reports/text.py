"""The report as Markdown and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from compresskit.reports.chain import Chain, Step
from compresskit.reports.figures import Figure, figures_of, write_ratio
from compresskit.reports.verdict import findings


def write_table(chain: Chain) -> str:
    """The figures of each step as aligned columns; ratios are to the first step."""
    figures = figures_of(chain)
    rows = [["stage", *(f.heading(chain) for f in figures)]]
    for step in chain.steps:
        rows.append([_name(step), *(_cell(chain, step, f, " ") for f in figures)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([chain.title, *lines])


def write_markdown(chain: Chain) -> str:
    """Heading, findings, figures, warnings, checks and conditions of one chain in GitHub's Markdown."""
    figures = figures_of(chain)
    parts = [f"# {_escape(chain.title)}", " -> ".join(_escape(_name(step)) for step in chain.steps)]
    if found := findings(chain) if len(chain.steps) > 1 else []:
        parts.append("\n".join(f"- **{f.tone}**: {_escape(f.text)}" for f in found))
    if figures:
        rows = [["stage", *(f.heading(chain) for f in figures)], ["---", *("---:" for _ in figures)]]
        rows += [[_name(s), *(_cell(chain, s, f, " ") for f in figures)] for s in chain.steps]
        parts.append(_rows(rows))
    warnings = [*chain.warnings, *(f"{s.title}: {w}" for s in chain.steps for w in s.warnings)]
    if warnings:
        parts += ["## Warnings", "\n".join(f"- {_escape(w)}" for w in warnings)]
    checks = [
        f"- after {_escape(_name(s))}: "
        + ", ".join(f"{kind} {n['kept']} of {n['checked']}" for kind, n in s.checks.items())
        for s in chain.steps
        if s.checks
    ]
    if checks:
        parts += ["## Promises kept", "\n".join(checks)]
    if conditions := _conditions(chain):
        parts += ["## Conditions", "\n".join(conditions)]
    return "\n\n".join(parts) + "\n"


def _conditions(chain: Chain) -> list[str]:
    lines = []
    for kind in ("quality", "latency", "memory"):
        record = next((s.records[kind] for s in chain.steps if kind in s.records), None)
        if record is not None:
            settings = ", ".join(f"{k} {v}" for k, v in record.settings.items() if v is not None)
            lines.append(
                f"- {kind}: {_escape(settings)}; {record.device}, {_escape(record.processor)}, threads "
                f"{record.threads}, repetitions {record.repetitions}"
            )
    if chain.versions:
        lines.append("- versions: " + ", ".join(f"{k} {v}" for k, v in chain.versions.items()))
    return lines


def _name(step: Step) -> str:
    return f"{step.title} {step.detail}".strip()


def _cell(chain: Chain, step: Step, figure: Figure, gap: str) -> str:
    value = figure.value(step)
    if value is None:
        return "-"
    ratio = write_ratio(figure.ratio(chain, step))
    return figure.write(value) + (f"{gap}{ratio}" if ratio else "")


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows)


def _escape(text: str) -> str:
    """``text`` so that Markdown shows it as it is."""
    for sign in "\\`*_<>|[]":
        text = text.replace(sign, "\\" + sign)
    return text
