"""The HTML page: one file, inline pictures, no script, nothing fetched; light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from compresskit.reports.chain import Chain, Step
from compresskit.reports.figures import (
    Figure,
    ends,
    figures_of,
    write_bytes,
    write_fraction,
    write_ms,
    write_quality,
    write_ratio,
)
from compresskit.reports.heat import heat
from compresskit.reports.svg import Bar, bars, curve, line
from compresskit.reports.verdict import findings, is_same, time_change, times

KNOWN_KINDS = ("source", "prune", "distill", "finetune", "quantize", "artifact")
ALIKE = {"qat": "quantize", "qlora": "finetune", "sparse_train": "prune"}
TAGS = {"gain": "gain", "cost": "cost", "note": "note"}
# Nothing may be fetched even if a text in a manifest says so.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(chains: Sequence[Chain]) -> str:
    """The whole document.

    Args:
        chains: one section each.

    Returns:
        HTML that depends on nothing outside itself.
    """
    style = (files("compresskit.reports") / "style.css").read_text(encoding="utf-8")
    title = escape(", ".join(chain.title for chain in chains))
    body = "".join(f'<section class="chain-of">{_section(chain)}</section>' for chain in chains)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>{title} - compresskit report</title><link rel="icon" href="data:,">'
        f"<style>\n{style}</style></head>\n<body><main>{body}"
        "<footer>Written by compresskit from its records; every time is the median of its repetitions."
        "</footer></main></body></html>\n"
    )


def _section(chain: Chain) -> str:
    parts = [_header(chain), _tiles(chain)]
    if len(chain.steps) > 1:
        parts.append(_findings(chain))
    if figures_of(chain):
        parts.append(f"<h2>Stage by stage</h2>{_table(chain)}")
        parts.append(f'<h2>In pictures</h2><div class="grid">{"".join(_pictures(chain))}</div>')
    parts += [_layers(chain), _warnings(chain), _checks(chain), _conditions(chain)]
    return "\n".join(part for part in parts if part)


def _kind(step: Step) -> str:
    """The step's colour; loose records have none of their own."""
    kind = ALIKE.get(step.kind, step.kind)
    return kind if kind in KNOWN_KINDS else "artifact"


def _header(chain: Chain) -> str:
    pills = "".join(
        f'<li><span class="pill c-{_kind(step)}">{escape(step.title)}'
        + (f"<span>{escape(step.detail)}</span>" if step.detail else "")
        + "</span></li>"
        for step in chain.steps
    )
    heading = f'<p class="eyebrow">compresskit report</p><h1>{escape(chain.title)}</h1>'
    return f'{heading}<ol class="chain">{pills}</ol>'


def _tiles(chain: Chain) -> str:
    """The four figures that a reader came for: the last step against the first."""
    made = []
    for kind, name, what, write, better in (
        ("size", "total_bytes", "Size on disk", write_bytes, "smaller"),
        ("memory", "peak_bytes", "Peak memory", write_bytes, "less"),
        ("latency", "decode_ms", "Time per token", write_ms, "faster"),
        ("latency", "prefill_ms", "Time of the prompt", write_ms, "faster"),
        ("quality", "bits_per_byte", "Bits per byte", write_quality, ""),
    ):
        pair = ends(chain, kind, name)
        if pair is None or (name == "prefill_ms" and ends(chain, "latency", "decode_ms")):
            continue
        first, last = pair
        same = is_same(first, last)
        if kind == "latency":
            change = time_change(chain.steps[0], chain.steps[-1], name)
            same = change.word == "unchanged" or not change.explained
        worse = {"smaller": "larger", "less": "more", "faster": "slower"}.get(better, "")
        if kind == "quality":
            big, same = f"{last / first - 1:+.1%}", abs(last / first - 1) < 0.0005
        else:
            big = (
                ("no faster" if better == "faster" else "unchanged")
                if same
                else f"{times(first, last)} {better if last < first else worse}"
            )
        tone = "note" if same else "gain" if last < first else "cost"
        made.append(
            f'<div class="card tile"><p class="what">{what}</p><p class="big {tone}">{big}</p>'
            f'<p class="from">{write(first)} &rarr; {write(last)}</p></div>'
        )
    return f'<div class="tiles">{"".join(made)}</div>' if made else ""


def _findings(chain: Chain) -> str:
    rows = "".join(
        f'<li><span class="tag {f.tone}">{TAGS[f.tone]}</span><span>{escape(f.text)}</span></li>'
        for f in findings(chain)
    )
    return f'<h2>What it means</h2><ul class="card findings">{rows}</ul>' if rows else ""


def _table(chain: Chain) -> str:
    figures = figures_of(chain)
    head = "".join(f"<th>{escape(f.heading(chain))}</th>" for f in figures)
    rows = []
    for step in chain.steps:
        detail = f"<small>{escape(step.detail)}</small>" if step.detail else ""
        cells = "".join(_figure_cell(chain, step, figure) for figure in figures)
        name = f'<span class="name c-{_kind(step)}">{escape(step.title)}</span>'
        rows.append(f"<tr><td>{name}{detail}</td>{cells}</tr>")
    return (
        f'<div class="card scroll"><table><thead><tr><th>stage</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure_cell(chain: Chain, step: Step, figure: Figure) -> str:
    value = figure.value(step)
    if value is None:
        return '<td class="soft">-</td>'
    ratio = write_ratio(figure.ratio(chain, step))
    return f"<td>{figure.write(value)}{f'<small>{ratio}</small>' if ratio else ''}</td>"


def _pictures(chain: Chain) -> list[str]:
    """One card for each thing that was measured."""
    by_name = {figure.name: figure for figure in figures_of(chain)}
    made = []
    if figure := by_name.get("total_bytes"):
        made.append(_bar_card(chain, figure, "Size on disk", "All files that the model needs."))
    if figure := by_name.get("peak_bytes"):
        caption = "Loading, one prompt and decoding in a fresh process. Grey: Python and its libraries alone."
        made.append(_bar_card(chain, figure, "Peak memory", caption))
    if figure := by_name.get("prefill_ms"):
        record = next(s.records["latency"] for s in chain.steps if "latency" in s.records)
        caption = (
            f"{record.settings.get('prompt_tokens', '?')} tokens, {_count(record.threads, 'thread')}, "
            f"median of {record.repetitions}; the whisker spans the quartiles."
        )
        made.append(_bar_card(chain, figure, "Time of the prompt", caption))
    if figure := by_name.get("decode_ms"):
        caption = "One token at a time with the key-value cache; the whisker spans the quartiles."
        made.append(_bar_card(chain, figure, "Time per token", caption))
    if figure := by_name.get("bits_per_byte"):
        points = [
            (s.title, _kind(s), value, figure.write(value))
            for s in chain.steps
            if (value := figure.value(s)) is not None
        ]
        record = next(s.records["quality"] for s in chain.steps if "quality" in s.records)
        caption = (
            f"Lower is better; {record.values['documents']:,} documents, {record.values['tokens']:,} tokens. "
            "The axis does not begin at zero."
        )
        made.append(_card("Quality: bits per byte", caption, line("Bits per byte of each stage", points)))
    for step in chain.steps:
        if len(step.losses) > 1:
            picture = curve(f"Training loss of {step.title}", step.losses, _kind(step))
            made.append(_card(f"Training loss: {step.title}", "Of each step, and its running mean.", picture))
    return made


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _card(title: str, caption: str, picture: str) -> str:
    caption = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure class="card"><h3>{escape(title)}</h3>{caption}{picture}</figure>'


def _bar_card(chain: Chain, figure: Figure, title: str, caption: str) -> str:
    rows = []
    for step in chain.steps:
        value = figure.value(step)
        if value is None:
            continue
        three = step.records[figure.kind].quartiles.get(figure.name)
        rows.append(
            Bar(
                label=step.title,
                kind=_kind(step),
                value=value,
                text=figure.write(value),
                ratio=write_ratio(figure.ratio(chain, step)),
                base=(step.value("memory", "baseline_bytes") or 0.0) if figure.name == "peak_bytes" else 0.0,
                whisker=(three[0], three[2]) if three else None,
            )
        )
    return _card(title, caption, bars(f"{title} of each stage", rows))


def _layers(chain: Chain) -> str:
    """For each stage that touched layers: how many zeros and how much error each has."""
    cards, rows = [], []
    for step in chain.steps:
        if not step.layers:
            continue
        figures = []
        for key, caption in (
            ("zero_fraction", "Zeros of each layer, block by block."),
            ("relative_error", "Relative error of each layer's output, block by block, log colours."),
        ):
            values = [layer[key] for layer in step.layers if layer.get(key) is not None]
            if values and (key != "zero_fraction" or any(values)):
                figures.append(heat(caption, step.layers, key, _kind(step)))
        name = f"<h3>{escape(step.title)} {escape(step.detail)}</h3>"
        maps = f'<div class="maps">{"".join(figures)}</div>'
        cards.append(f'<div class="card wide c-{_kind(step)}">{name}{maps}</div>')
        rows += [_layer_row(step, layer) for layer in step.layers]
    if not cards:
        return ""
    table = (
        "<details><summary>Every layer as a table</summary>"
        '<div class="card scroll"><table><thead><tr><th>layer</th><th>stage</th><th>zeros</th><th>bits</th>'
        f"<th>error</th><th>note</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )
    return "<h2>Layer by layer</h2>" + "".join(cards) + table


def _layer_row(step: Step, layer: Mapping[str, Any]) -> str:
    error = layer.get("relative_error")
    cells = (
        escape(layer["name"]),
        escape(step.title),
        write_fraction(layer["zero_fraction"]),
        f"{layer['bits']:.4g}",
        "-" if error is None else f"{error:.2e}",
        escape(layer.get("note", "")),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _warnings(chain: Chain) -> str:
    texts = [*chain.warnings, *(f"{s.title}: {w}" for s in chain.steps for w in s.warnings)]
    texts += _cautions(chain)
    if not texts:
        return ""
    rows = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<h2>Warnings</h2><ul class="card warnings">{rows}</ul>'


def _cautions(chain: Chain) -> list[str]:
    """Notes of the records that bear on whether a figure may be trusted; each once, with its steps."""
    noted: dict[tuple[str, str], list[str]] = {}
    for step in chain.steps:
        for kind in ("latency", "quality"):
            for note in step.records[kind].notes if kind in step.records else ():
                noted.setdefault((kind, note), []).append(step.title)
    return [f"{kind} of {', '.join(titles)}: {note}" for (kind, note), titles in noted.items()]


def _checks(chain: Chain) -> str:
    """Which promises were checked after which stage."""
    checked = [step for step in chain.steps if step.checks]
    kinds = list(dict.fromkeys(kind for step in checked for kind in step.checks))
    if not kinds:
        return ""
    rows = []
    for step in checked:
        cells = []
        for kind in kinds:
            count = step.checks.get(kind)
            if count is None:
                cells.append('<td class="soft">-</td>')
                continue
            tone = "gain" if count["kept"] == count["checked"] else "cost"
            cells.append(f'<td class="{tone}">{count["kept"]} of {count["checked"]}</td>')
        name = f'<span class="name c-{_kind(step)}">{escape(step.title)}</span>'
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(kind)}</th>" for kind in kinds)
    return (
        '<h2>Promises kept</h2><div class="card scroll"><table><thead><tr><th>checked after</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _conditions(chain: Chain) -> str:
    """Machine, versions and settings of every kind of record, and how long the stages took."""
    rows = []
    for kind in ("size", "quality", "latency", "memory"):
        record = next((s.records[kind] for s in chain.steps if kind in s.records), None)
        if record is None:
            continue
        settings = ", ".join(f"{k} {v}" for k, v in record.settings.items() if v is not None)
        machine = f"{record.device}; {record.processor}; threads {record.threads}; seed {record.seed}"
        rows.append((kind, f"{settings}; repetitions {record.repetitions}" if settings else "-", machine))
    if any(step.seconds for step in chain.steps):
        spent = ", ".join(f"{s.title} {s.seconds:.1f} s" for s in chain.steps if s.seconds is not None)
        rows.append(("durations", spent, "of each stage"))
    if chain.versions:
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in chain.versions.items()), "of the run"))
    if not rows:
        return ""
    body = "".join(
        "<tr>" + "".join(f'<td class="wrap">{escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return (
        '<h2>Under which conditions</h2><div class="card scroll left"><table><thead><tr><th>record</th>'
        f"<th>settings</th><th>machine</th></tr></thead><tbody>{body}</tbody></table></div>"
    )
