"""A cut of a model that brings code of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_llama

from compresskit.errors import ModelError
from compresskit.modeling import ModelSource, open_model
from compresskit.sparse.stage import Prune
from compresskit.stage import Outlook

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineModel(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tiny_llama(tmp_path / "own")
    (directory / "mine.py").write_text(CODE)
    changes = {
        "architectures": ["MineModel"],
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineModel"},
    }
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match="trust_remote_code"):
        open_model(directory)
    return open_model(directory, trust_remote_code=True)


def test_a_cut_is_foreseen_with_the_models_own_code(model: ModelSource) -> None:
    before = Outlook(
        anatomy=model.anatomy,
        config=model.config,
        tokenizer=model.directory,
        original=model.directory,
        weight_bytes=4.0,
        trust_remote_code=True,
    )
    cut = Prune("cut", options={"layers": 1, "ffn": 0.5})
    assert cut.faults(before, "stages[0]") == []
    after = cut.forecast(before).after
    assert len(after.anatomy.blocks) == 1
    assert after.config.intermediate_size == 32
