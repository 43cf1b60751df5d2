"""Cuts of models whose blocks are not all alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compresskit.errors import ModelError
from compresskit.modeling import ModelSource, open_model
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured import cut
from compresskit.sparse.structured.surgery import Kept
from tests.sparse.structured.zoo import GROUPED, SMALL, outlook, run

LFM2 = {**GROUPED, "layer_types": ["conv", "conv", "full_attention", "full_attention"]}
LFM2.pop("head_dim")
BAMBA = {
    **GROUPED,
    "attn_layer_indices": [3],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
BAMBA.pop("head_dim")


def built(name: str, settings: dict[str, Any], directory: Path) -> ModelSource:
    cls: Any = getattr(transformers, name)
    torch.manual_seed(0)
    cls(cls.config_class(**settings)).save_pretrained(directory)
    return open_model(directory)


def said(model: ModelSource, **options: Any) -> str:
    return "\n".join(map(str, Prune("cut", options=options).faults(outlook(model), "s")))


def test_data_cannot_choose_among_blocks_that_differ(tmp_path: Path) -> None:
    model = built("ModernBertForMaskedLM", SMALL, tmp_path)
    assert said(model, layers=2, importance="activation") == (
        "s.importance: expected blocks that all have the same parameters, where data chooses which stay, "
        "got 2 kinds of block. Set importance: magnitude, which keeps evenly spaced blocks."
    )
    assert said(model, layers=2) == ""


def test_a_list_of_kinds_is_cut_along_but_data_would_leave_another_size(tmp_path: Path) -> None:
    model = built("Lfm2ForCausalLM", LFM2, tmp_path / "model")
    assert "got 2 kinds of block" in said(model, layers=1, importance="taylor")
    stage = Prune("cut", options={"layers": 2})
    result, after = run(stage, model, tmp_path)
    assert after.config.layer_types == ["conv", "full_attention"]
    planned = stage.forecast(outlook(model)).after.anatomy.num_parameters
    assert planned == after.anatomy.num_parameters == result.metrics["parameters_kept"]


def test_blocks_named_by_index_are_not_lost(tmp_path: Path) -> None:
    model = built("BambaForCausalLM", BAMBA, tmp_path)
    fault = said(model, layers=2)
    assert "config.json: expected blocks that are the same in another place, got" in fault
    assert "Keep other blocks" in fault


def test_blocks_really_kept_are_checked_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built("ModernBertForMaskedLM", SMALL, tmp_path / "model")
    monkeypatch.setattr(cut, "choose", lambda *_: Kept((1, 2)))
    with pytest.raises(ModelError, match=r"other parameters for blocks 1, 2: model\.layers\.0\.attn_norm"):
        run(Prune("cut", options={"layers": 2}), model, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_heads_dealt_out_to_fixed_parts_are_not_cut(tmp_path: Path) -> None:
    settings = {**SMALL, "num_attention_heads": 8, "rotary_dim": 2}
    settings.pop("intermediate_size")
    model = built("CodeGenForCausalLM", settings, tmp_path)
    assert "expected keys for the hidden size 32 alone, got none" in said(model, hidden=0.5)
    assert "s.heads: expected heads" in said(model, heads=4)
    assert said(model, ffn=0.5) == ""


@pytest.mark.parametrize(
    ("name", "settings", "value"),
    [
        ("DiffLlamaForCausalLM", {}, "self_attn.lambda_init"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "attn.scaling"),
        ("LlamaForCausalLM", {}, None),
        ("GPT2LMHeadModel", {}, None),
    ],
)
def test_what_follows_from_the_position_of_a_block_is_told(
    name: str, settings: dict[str, Any], value: str | None, tmp_path: Path
) -> None:
    model = built(name, {**SMALL, **settings}, tmp_path / "model")
    stage = Prune("cut", options={"layers": 2})
    notes = stage.forecast(outlook(model)).notes
    told = [f"Blocks that move compute otherwise: {value} follow from their position."] if value else []
    assert [note for note in notes if "position" in note] == told
    result, _ = run(stage, model, tmp_path)
    assert list(result.warnings) == told
