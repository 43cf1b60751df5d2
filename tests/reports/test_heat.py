"""Layers are placed by block and name, whatever a model calls them."""

from __future__ import annotations

import re

from compresskit.reports.heat import heat, layer_map


def record(name: str, value: float | None = 0.5) -> dict[str, object]:
    return {"name": name, "zero_fraction": 0.5, "relative_error": value, "bits": 8, "note": ""}


def test_blocks_in_numeric_order_and_short_names() -> None:
    names = [f"model.layers.{b}.{n}" for b in (10, 2) for n in ("self_attn.q_proj", "mlp.up_proj")]
    grid = layer_map([record(n) for n in names])
    assert grid.columns == ("2", "10")
    assert grid.rows == ("q_proj", "up_proj")
    assert grid.cells["q_proj", "10"]["name"] == "model.layers.10.self_attn.q_proj"


def test_full_names_where_short_ones_clash() -> None:
    tails = ["attention.output.dense", "intermediate.dense", "output.dense"]
    grid = layer_map([record(f"encoder.layer.0.{t}") for t in tails] + [record("lm_head")])
    assert grid.rows == (*tails, "lm_head")
    assert grid.columns == ("0", "")


def test_gpt2_blocks() -> None:
    assert layer_map([record("transformer.h.3.attn.c_attn")]).columns == ("3",)
    assert layer_map([record("h.3.attn.c_attn")]).columns == ("3",)


def test_larger_errors_are_stronger_and_missing_ones_empty() -> None:
    layers = [record(f"m.{i}.a", v) for i, v in enumerate((1e-6, 1e-3, 0.0, None, 0.1))]
    picture = heat("error", layers, "relative_error", "prune")
    opacity = [float(v) for v in re.findall(r'fill-opacity="([\d.]+)"', picture)]
    assert len(opacity) == 4
    assert opacity[2] < opacity[0] < opacity[1] < opacity[3]
    assert "m.1.a: 0.1%" in picture


def test_many_blocks_fit() -> None:
    picture = heat("zeros", [record(f"m.{i}.a") for i in range(96)], "zero_fraction", "prune")
    rights = [
        float(x) + float(w)
        for x, w in re.findall(r'<rect class="k-prune" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', picture)
    ]
    assert len(rights) == 96
    assert max(rights) <= 1000
