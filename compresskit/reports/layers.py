"""The linear layers of a checkpoint as a table for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from compresskit.kernels.limits import DENSE, PACKED_BY, gain_on
from compresskit.measure.inspect import Inspection, LayerWorth
from compresskit.reports.figures import write_bytes, write_fraction, write_ms
from compresskit.sparse.worth import joined, short


def write_layers(found: Inspection) -> str:
    """A row for each layer, and below what the columns mean and which runtimes gain anything."""
    is_timed = any(layer.timing for layer in found.layers)
    parts = list(dict.fromkeys(part for layer in found.layers for part in layer.stored_bytes))
    head = ["layer", "shape", "zeros", "pattern", "bits", *parts, "bytes", "packed", "at most"]
    rows = [head + (["dense", "sparse", "here"] if is_timed else [])]
    rows += [_cells(layer, parts, is_timed) for layer in found.layers]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = {0, 3}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, "", *_legend(found, is_timed)])


def _cells(layer: LayerWorth, parts: Sequence[str], is_timed: bool) -> list[str]:
    gains = layer.packing.storage != DENSE
    stored = layer.stored_bytes
    cells = [
        layer.name,
        f"{layer.out_features}x{layer.in_features}",
        write_fraction(layer.zeros.zero_fraction),
        str(layer.zeros),
        f"{8 * layer.values.bytes_per_weight:.3g}",
        *(write_bytes(stored[part]) if part in stored else "-" for part in parts),
        short(layer.bytes_per_weight),
        short(layer.packing.bytes_per_weight) if gains else "-",
        f"{layer.limit:.2f}x" if gains else "-",
    ]
    if not is_timed:
        return cells
    timing = layer.timing
    if timing is None:
        return [*cells, "-", "-", "-"]
    sparse = write_ms(timing.sparse_ms[1]) if timing.sparse_ms else "-"
    here = f"{timing.ratio:.2f}x {timing.kernel}".strip() if timing.sparse_ms else "-"
    return [*cells, write_ms(timing.dense_ms[1]), sparse, here]


def _legend(found: Inspection, is_timed: bool) -> list[str]:
    sparse = [layer for layer in found.layers if layer.zeros.zero_fraction]
    if not sparse:
        return ["No layer has zeros."]
    lines = [
        "bytes: of a weight as stored; packed: the fewest that hold its zeros; at most: what packing gains "
        "over the layer as it is, at batch 1."
    ]
    if packed := [layer for layer in found.layers if layer.stored_bytes]:
        lines.append(_stored(packed))
    slow = [name for name in PACKED_BY if all(gain_on(name, x.values, x.zeros) == 1 for x in sparse)]
    if slow:
        lines.append(f"{joined(slow)} multiply by zeros as by any number: 1.00x there.")
    if is_timed:
        timed = [layer.timed_as for layer in found.layers if layer.timing]
        where = found.device if found.device != "cpu" else f"{found.processor}, threads {found.threads}"
        lines.append(
            f"here: dense over the fastest sparse kernel of torch, medians at batch 1 in {found.dtype} on "
            f"{where}; {len(set(timed))} of {len(timed)} layers were timed, each for all of its shape and "
            "pattern."
        )
        lines.append(_together(found))
    return lines + [f"note: {note}" for note in found.notes]


def _stored(packed: Sequence[LayerWorth]) -> str:
    """What the layers whose zeros are left out of the file take, part by part, and would take dense."""
    parts = Counter[str]()
    for layer in packed:
        parts.update(layer.stored_bytes)
    dense = sum(x.values.bytes_per_weight * x.out_features * x.in_features for x in packed)
    each = joined([f"{part} {write_bytes(size)}" for part, size in parts.items()])
    whole = sum(parts.values())
    return (
        f"Packed: {len(packed)} of the layers, in {write_bytes(whole)} ({each}); with their zeros they would "
        f"take {write_bytes(dense)}, {dense / whole:.2f}x."
    )


def _together(found: Inspection) -> str:
    """What all timed layers take one after another, and would with the faster of both kinds each."""
    pairs = [(t.dense_ms[1], t.sparse_ms[1]) for x in found.layers if (t := x.timing) and t.sparse_ms]
    if not pairs:
        return "No kernel of torch multiplies these zeros on this device: they are worth nothing here."
    dense, best = sum(d for d, _ in pairs), sum(min(pair) for pair in pairs)
    faster = sum(s < d for d, s in pairs)
    return (
        f"{faster} of {len(pairs)} layers are faster sparse. Together they take {write_ms(dense)} dense, and "
        f"{write_ms(best)} with each as it is faster: {dense / best:.2f}x."
    )
