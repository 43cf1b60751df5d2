"""A teacher in 8 or 4 bits: what it multiplies with, how far it is from the full one, what it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_placements import VOCABULARY, faults_of, outlook
from test_stages import FEW, run
from tiny import byte_tokenizer, stories, tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from compresskit.data.spec import DataSpec
from compresskit.distill.few_bits import FewBits, sample, streamed_states
from compresskit.distill.placements import PLACEMENTS
from compresskit.distill.placements.base import Teaching
from compresskit.distill.placements.few_bits import rounded_layers
from compresskit.distill.stage import Distill
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.training.adapters.bits import rounded

pytest.importorskip("bitsandbytes")
BITS = {"8bit": "int8", "4bit": "nf4"}
TOLERANCE = {"8bit": 0.05, "4bit": 1e-4}
"""Of hidden states: in int8 a layer's inputs are rounded too."""


def tiny_gpt2(directory: Path) -> Path:
    """Its linear layers store their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(params=["llama", "gpt2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSource:
    if request.param == "gpt2":
        return open_model(str(tiny_gpt2(tmp_path / "gpt2")))
    wide = {"num_hidden_layers": 3, "initializer_range": 0.2, "tie_word_embeddings": False}
    return open_model(str(tiny_llama(tmp_path / "llama", **wide)))


def teacher_of(source: ModelSource, name: str, **changes: Any) -> FewBits:
    teaching = replace(Teaching(teacher=source, vocabulary=VOCABULARY), **changes)
    made: FewBits = PLACEMENTS[name]().part(teaching).make()
    made.load()
    return made


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "position_ids": torch.arange(16).repeat(3, 1), "labels": labels}


def by_hand(source: ModelSource, base: str) -> Any:
    """The full model with the weight of every rounded layer replaced by the rounded one."""
    model: Any = load_model(source)
    for name in rounded_layers(source.anatomy):
        weight_OI = rounded(source.weight_OI(name), base)
        turned = source.anatomy.linears[name].transposed
        model.get_submodule(name).weight.data = weight_OI.t() if turned else weight_OI
    return model


@pytest.mark.parametrize("name", BITS)
def test_the_blocks_multiply_with_rounded_weights_and_nothing_else_is_rounded(
    source: ModelSource, name: str
) -> None:
    inputs, model = batch(), by_hand(source, BITS[name])
    said = teacher_of(source, name, blocks=(0, 1)).signal(inputs)
    with torch.no_grad():
        made = model(**{k: inputs[k] for k in ("input_ids", "position_ids")}, output_hidden_states=True)
    states = said.says.states_BTE  # type: ignore[union-attr]
    scale = made.hidden_states[-1].abs().max()
    torch.testing.assert_close(states, made.hidden_states[-1], rtol=0, atol=float(TOLERANCE[name] * scale))
    torch.testing.assert_close(said.blocks_BTE[0], made.hidden_states[1], rtol=0, atol=TOLERANCE[name] * 4)
    head = said.says.head  # type: ignore[union-attr]
    assert torch.equal(head.weight_VD, source.tensor("lm_head.weight"))


@pytest.mark.parametrize("name", BITS)
def test_the_divergence_from_the_full_teacher_is_that_of_whole_logits(source: ModelSource, name: str) -> None:
    inputs = batch()
    teacher, full = teacher_of(source, name), load_model(source)
    asked = {k: inputs[k] for k in ("input_ids", "position_ids")}
    said: Any = teacher.signal(inputs).says
    with torch.no_grad():
        q = (said.states_BTE @ said.head.weight_VD.T).log_softmax(-1)
        p = full(**asked).logits.log_softmax(-1)
    keep = inputs["labels"][:, 1:] != -100
    expected = (p.exp() * (p - q)).sum(-1)[:, :-1][keep].mean()
    assert teacher.divergence(*inputs.values()) == pytest.approx(float(expected), rel=1e-3)
    assert expected > 1e-6


def test_a_full_teacher_read_block_by_block_computes_the_same(source: ModelSource) -> None:
    inputs = batch()
    full: Any = load_model(source)
    with torch.no_grad():
        states = full.base_model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])[0]
    assert torch.equal(streamed_states(source, inputs["input_ids"], inputs["position_ids"]), states)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_held_is_what_was_foreseen(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = open_model(str(tiny_llama(tmp_path / "m", dtype=dtype, hidden_size=64, intermediate_size=128)))
    teacher = teacher_of(source, name)
    found = sum(p.nbytes for p in teacher._model.parameters())
    for layer in teacher.layers:
        module: Any = teacher._model.get_submodule(layer)
        if name == "8bit":
            found += module.weight.SCB.nbytes
        else:
            found += module.quant_state.absmax.nbytes + module.quant_state.state2.absmax.nbytes
    stage = Distill(teacher_placement=name)
    teaching = Teaching(teacher=source, vocabulary=VOCABULARY)
    assert PLACEMENTS[name]().held_bytes(stage, outlook(source), teaching) == found < source.bytes


@pytest.mark.parametrize("name", BITS)
def test_a_stage_learns_from_it_and_tells_how_far_it_is(tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(stories(60))
    source = open_model(str(tiny_llama(tmp_path / "student")))
    teacher = tiny_llama(tmp_path / "teacher", seed=1, initializer_range=0.2)
    stage = Distill(teacher=str(teacher), teacher_placement=name, features="hidden_mse", **FEW)
    assert stage.faults(outlook(source), "s") == []
    result, _ = run(stage, source, DataSpec(source=str(text)), tmp_path / "s")
    (told,) = [w for w in result.warnings if "nats per token" in w]
    assert told.startswith(f"The teacher in {name[0]} bits is ")
    assert "4 rows of 24 tokens" in told
    assert result.metrics["final_parts"]["forward_kl"] > 0


def test_rows_without_supervision_are_no_measure(source: ModelSource) -> None:
    row = {name: tensor[0] for name, tensor in batch().items()}
    silent = [row | {"labels": torch.full_like(row["labels"], -100)}] * 8
    (told,) = teacher_of(source, "4bit").told(silent, torch.device("cpu"))
    assert "was not measured: none of the 4 rows" in told


def test_a_few_rows_are_spread_over_all() -> None:
    assert (sample(1000), sample(3)) == ([0, 250, 500, 750], [0, 1, 2])


def test_without_the_package_the_cure_is_told(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.distill.placements.few_bits.find_spec", lambda name: None)
    where = "s.teacher_placement"
    assert faults_of(source, "4bit") == [(where, "an environment without it")]
    stage = Distill(teacher_placement="8bit")
    (fault,) = stage.faults(outlook(source), "s")
    assert "pip install 'compresskit[qlora]'" in fault.cure
