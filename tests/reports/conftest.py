"""Artifacts as the pipeline leaves them: a manifest, records, timings and a training log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compresskit.measure import Record, write_records

LAYERS = [f"model.layers.{b}.{n}" for b in range(3) for n in ("self_attn.q_proj", "mlp.up_proj")]
NAMES = {"prune": "1-prune", "distill": "2-distill", "quantize": "3-quantize"}


def make_records(
    subject: str,
    *,
    total_bytes: int = 1_000_000,
    prefill: tuple[float, float, float] = (9.0, 10.0, 11.0),
    decode: tuple[float, float, float] = (0.9, 1.0, 1.1),
    nats: float = 1.0,
    zeros: float = 0.0,
    model_bytes: int = 5_000_000,
    parameters: int = 250_000,
    **fields: Any,
) -> list[Record]:
    size = {"total_bytes": total_bytes, "num_parameters": parameters, "zero_fraction": zeros}
    size["bytes_per_parameter"] = total_bytes / parameters
    quality = {"tokens": 1000, "nats_per_token": nats, "perplexity": 2.718**nats, "documents": 7}
    memory = {"baseline_bytes": 300_000_000, "model_bytes": model_bytes}
    settings = {"prompt_tokens": 128, "decode_tokens": 32, "dtype": "float32"}
    three = {"prefill_ms": prefill, "decode_ms": decode}
    return [
        Record(kind="size", subject=subject, values=size, **fields),
        Record(kind="quality", subject=subject, values={**quality, "bits_per_byte": nats / 1.5}, **fields),
        Record(
            kind="latency",
            subject=subject,
            values={name: q[1] for name, q in three.items()},
            quartiles=three,
            settings=settings,
            repetitions=9,
            **fields,
        ),
        Record(
            kind="memory",
            subject=subject,
            values={**memory, "peak_bytes": 300_000_000 + model_bytes},
            settings=settings,
            **fields,
        ),
    ]


def layer_records(zero_fraction: float, bits: float) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "zero_fraction": zero_fraction,
            "bits": bits,
            "relative_error": 0.01 * (i + 1),
            "note": "",
        }
        for i, name in enumerate(LAYERS)
    ]


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., Path]:
    """Write an artifact directory; changes are merged into its manifest."""

    def make(name: str = "out", records: list[Record] | None = None, **changes: Any) -> Path:
        place = tmp_path / name
        promise = [{"kind": "zeros", "layer": layer} for layer in LAYERS]
        kept = {"shape": {"checked": 20, "kept": 20}, "zeros": {"checked": 6, "kept": 6}}
        empty = {"promises": [], "layers": [], "metrics": {}, "warnings": []}
        manifest = {
            "format": 1,
            "plan": "0" * 64,
            "recipe": {
                "model": "models/tiny",
                "stages": [
                    {"prune": {"method": "wanda", "pattern": "50%"}},
                    {"distill": {"loss": "forward_kl", "steps": 150}},
                    {"quantize": {"method": "rtn", "scheme": "w8a8"}},
                ],
            },
            "source": "1" * 64,
            "versions": {"torch": "2.13.0"},
            "stages": [
                {
                    "name": NAMES["prune"],
                    "kind": "prune",
                    "result": {**empty, "promises": promise, "layers": layer_records(0.5, 32)},
                    "checks": kept,
                },
                {
                    "name": NAMES["distill"],
                    "kind": "distill",
                    "result": {
                        **empty,
                        "metrics": {"final_loss": 0.2},
                        "warnings": ["Rows were cut <here>."],
                    },
                    "checks": kept,
                },
                {
                    "name": NAMES["quantize"],
                    "kind": "quantize",
                    "result": {**empty, "layers": layer_records(0.5, 8.1)},
                    "checks": {**kept, "grid": {"checked": 6, "kept": 6}},
                },
            ],
            "warnings": ["Rows were cut <here>."],
            "files": {},
        }
        place.mkdir()
        (place / "compresskit.json").write_text(json.dumps({**manifest, **changes}))
        if records is None:
            records = make_records("0-source")
            records += make_records("1-prune", nats=1.5, zeros=0.5)
            records += make_records("2-distill", nats=1.1, zeros=0.5)
            records += make_records("artifact", nats=1.12, zeros=0.5, total_bytes=270_000)
        write_records(records, place / "records")
        (place / "records" / "plan.json").write_text('"0123"')
        (place / "records" / "1-prune.seconds.json").write_text("3.25\n")
        (place / "records" / "2-distill.record.json").write_text('{"anything": [1, 2]}')
        rows = [json.dumps({"step": i + 1, "loss": 1 / (i + 1)}) for i in range(150)]
        (place / "records" / "2-distill.losses.jsonl").write_text("\n".join(rows) + "\n")
        return place

    return make
