"""Products in int8 while a model trains: really int8, near the float run, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import broken_off_in
from safetensors.torch import load_file
from tiny import byte_tokenizer, stories, tiny_llama
from torch import Tensor, nn
from torch.utils._triton import has_triton
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from compresskit.data.spec import DataSpec
from compresskit.distill.finetune import Finetune
from compresskit.errors import EngineError
from compresskit.modeling import ModelSource
from compresskit.stage import Outlook
from compresskit.training.fields import TrainingFields
from compresskit.training.int8 import int8_products
from compresskit.training.job import Part, TrainJob
from compresskit.training.job import train as carry_out
from compresskit.training.order import Rows
from compresskit.training.outcome import TrainOutcome
from compresskit.training.run import Run
from compresskit.training.watch import LossLog

pytest.importorskip("torchao")
pytestmark = pytest.mark.skipif(has_triton(), reason="beside a GPU torchao multiplies int8 there alone")

Make = Callable[..., LlamaForCausalLM]
STEPS = 10
LAYERS = 14
"""Linear layers in two blocks of a Llama."""
TOLERANCE = 5e-3
"""Relative, of a loss at any of the steps: a rounded product is off by about a hundredth."""
FIELDS = TrainingFields(
    steps=STEPS, batch_size=4, learning_rate=1e-2, checkpoint_every=0, warmup_fraction=0.0, matmul="int8"
)


def train(model: nn.Module, rows: Rows, scratch: Path, **changes: Any) -> TrainOutcome:
    extra = {name: changes.pop(name) for name in ("held", "validation", "save") if name in changes}
    return Run(model, rows, fields=replace(FIELDS, **changes), scratch=scratch, device="cpu", **extra).train()


def losses(scratch: Path) -> list[float]:
    return LossLog(scratch / "losses.jsonl").losses()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, ...]]:
    """The types of every integer product that runs, in order."""
    seen: list[tuple[torch.dtype, ...]] = []
    multiply = torch._int_mm

    def counted(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.dtype, b.dtype))
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", counted)
    return seen


def test_blocks_multiply_int8_in_training_and_float_in_evaluations(
    make_model: Make, rows: Rows, tmp_path: Path, products: list[tuple[torch.dtype, ...]]
) -> None:
    """Output, input gradient and weight gradient: three products a layer and step."""
    train(make_model(), rows, tmp_path, validation=rows, eval_every=4)
    assert products == [(torch.int8, torch.int8)] * (3 * LAYERS * STEPS)


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"activation_checkpointing": True}, {"micro_batch_size": 2}],
    ids=str,
)
def test_the_loss_falls_as_it_does_in_float(
    make_model: Make, rows: Rows, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(make_model(), rows, tmp_path / "float", **changes, matmul="float")
    outcome = train(make_model(), rows, tmp_path / "int8", **changes)
    mine, true = losses(tmp_path / "int8"), losses(tmp_path / "float")
    assert mine == pytest.approx(true, rel=TOLERANCE)
    assert mine != true
    assert len(mine) == STEPS
    assert outcome.final_loss < outcome.first_loss
    assert mine[-1] < 0.9 * mine[0], "nothing was learnt, so nothing was compared"


def test_the_type_of_activations_is_the_precisions(make_model: Make) -> None:
    model, seen = make_model(attention_bias=True), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *io: seen.append(io[2].dtype))
    with int8_products(model), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None])
    assert seen == [torch.bfloat16]


def test_zeros_stay_and_plain_tensors_are_saved(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    model, saved = make_model().to(torch.bfloat16), {}
    names = tuple(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).weight[:, ::2] = 0
    train(model, rows, tmp_path, held=names, weight_decay=0.1, save=saved.update)
    assert saved.keys() == before.keys()
    assert {(type(t), t.dtype) for t in saved.values()} == {(Tensor, torch.bfloat16)}
    for name in names:
        layer, weight = model.get_submodule(name), saved[f"{name}.weight"]
        assert not weight[:, ::2].any(), name
        assert not torch.equal(weight[:, 1::2], before[f"{name}.weight"][:, 1::2]), name
        assert torch.equal(layer.weight, weight)
        assert type(layer) is nn.Linear
        assert "config" not in layer.__dict__


def test_a_restart_gives_the_same_bytes(make_model: Make, rows: Rows, tmp_path: Path) -> None:
    straight, broken, again = make_model(), make_model(), make_model()
    train(straight, rows, tmp_path / "straight", checkpoint_every=4)
    with broken_off_in(step=7):
        train(broken, rows, tmp_path / "broken", checkpoint_every=4)
    assert type(broken.model.layers[0].mlp.up_proj) is nn.Linear
    assert train(again, rows, tmp_path / "broken", checkpoint_every=4).resumed_from == 4
    for (name, a), b in zip(straight.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    # Weights that were trained in int8 are not those of a float run that may be continued.
    float_run = train(make_model(), rows, tmp_path / "broken", checkpoint_every=4, matmul="float")
    assert float_run.resumed_from == 0


def test_the_checkpoint_loads_plainly(tmp_path: Path, token_cache: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(stories(100))
    model = tiny_llama(tmp_path / "model", num_hidden_layers=1, dtype=torch.bfloat16)
    (tmp_path / "out").mkdir()
    job = TrainJob(
        model=str(model),
        out=str(tmp_path / "out"),
        scratch=str(tmp_path / "scratch"),
        fields=asdict(replace(FIELDS, steps=4)),
        objective=Part("compresskit.training.objective:CrossEntropy"),
        data=asdict(DataSpec(source=str(text))),
        context_length=24,
        cache=str(token_cache),
        device="cpu",
    )
    assert carry_out(TrainJob.from_json(job.to_json())).steps == 4
    loaded, said = AutoModelForCausalLM.from_pretrained(job.out, dtype="auto", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    before, stored = (load_file(Path(place) / "model.safetensors") for place in (model, job.out))
    assert stored.keys() == before.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert not torch.equal(tensor, before[name]), name
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear


def outlook(place: Path) -> Outlook:
    source = ModelSource(place)
    return Outlook(
        anatomy=source.anatomy,
        config=source.config,
        tokenizer=source.directory,
        original=source.directory,
        weight_bytes=4.0,
    )


def test_a_plan_says_what_int8_gives(tmp_path: Path) -> None:
    model = outlook(tiny_llama(tmp_path / "model"))
    stage = Finetune(matmul="int8")
    assert stage.faults(model, "s") == []
    assert any("int8" in note for note in stage.forecast(model).notes)
    assert any("GPU" in note for note in stage.forecast(replace(model, device="cuda")).notes)
    assert not any("int8" in note for note in Finetune().forecast(model).notes)


def test_a_model_without_such_layers_is_refused(rows: Rows, tmp_path: Path) -> None:
    """GPT-2 stores its weights transposed; the output projection, a Linear, stays float anyway."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (fault,) = Finetune(matmul="int8").faults(outlook(tmp_path / "model"), "stages[0]")
    assert fault.where == "stages[0].matmul"
    assert "matmul float" in fault.cure
    with pytest.raises(EngineError, match=r"matmul: expected torch\.nn\.Linear layers"):
        train(model, rows, tmp_path / "scratch")
