"""Adapters of ``finetune`` on the model as it is stored: what trains, stays, comes out and is told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import outlook, stories, tiny_bert, tiny_llama
from torch import Tensor

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.distill.finetune import Finetune
from compresskit.distill.stage import Distill
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.quant.qlora import Qlora
from compresskit.stage import StageContext, StageResult
from compresskit.training.adapters.outlook import as_stored_layers

pytest.importorskip("peft")
from peft import PeftModel

# peft asks transformers by an old name; compresskit.training.adapters.attach says the same.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

FEW: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "context_length": 24,
    "learning_rate": 1e-2,
    "checkpoint_every": 0,
    "rank": 4,
}
KEPT: dict[str, Any] = {"finish": "adapter"}
# A prefix moves a random model little.
PREFIX: dict[str, Any] = KEPT | {"trainable": "prefix", "learning_rate": 0.3}


@dataclass(frozen=True)
class Zeros:
    layer: str
    kind: ClassVar[str] = "zeros"

    def broken(self, made: Any, now: Any) -> tuple[str, ...]:
        return ()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(stories())
    return DataSpec(source=str(path))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Stored in bfloat16."""
    place = tmp_path_factory.mktemp("narrow")
    return open_model(str(tiny_llama(place, dtype=torch.bfloat16, attention_bias=True)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, narrow: ModelSource) -> ModelSource:
    """The same numbers stored in float32."""
    place = tiny_llama(tmp_path_factory.mktemp("wide"), attention_bias=True)
    tensors = {name: tensor.float() for name, tensor in load_file(narrow.directory / FILE).items()}
    save_file(tensors, place / FILE, {"format": "pt"})
    return open_model(str(place))


FILE = "model.safetensors"


def run(stage: Any, source: ModelSource, text: DataSpec, place: Path, *held: str) -> tuple[StageResult, Path]:
    (place / "out").mkdir(parents=True)
    (place / "scratch").mkdir()
    context = StageContext(
        out=place / "out",
        scratch=place / "scratch",
        original=source.directory,
        data=text,
        device="cpu",
        cache=place / "cache",
        promises=tuple(map(Zeros, held)),
    )
    return stage.run(source, context), place / "out"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval().float()(input_ids=torch.arange(40, 56)[None]).logits
    return found


@pytest.mark.parametrize(
    "way", [{"trainable": "bottleneck"} | KEPT, PREFIX, {"trainable": "dora"} | KEPT], ids=str
)
def test_a_kept_adapter_learns_beside_a_model_to_the_bit_as_it_was(
    way: dict[str, Any], wide: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    result, out = run(Finetune(**FEW | way), wide, text, tmp_path)
    made = ModelSource(out)
    assert all(torch.equal(made.tensor(name), wide.tensor(name)) for name in wide.names())
    metrics = result.metrics
    assert metrics["final_loss"] < metrics["first_loss"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"]
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == metrics["trained_parameters"]
    tuned = PeftModel.from_pretrained(load_model(made), out / "adapter")
    assert (logits(tuned) - logits(load_model(wide))).abs().max() > 1e-3


def test_a_kept_lora_folded_in_by_peft_is_the_merged_checkpoint(
    wide: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    lora = FEW | {"trainable": "lora", "dropout": 0.1}
    _, kept = run(Finetune(**lora | KEPT), wide, text, tmp_path / "kept")
    _, merged = run(Finetune(**lora), wide, text, tmp_path / "merged")
    tuned = PeftModel.from_pretrained(load_model(ModelSource(kept)), kept / "adapter")
    folded = load_model(ModelSource(merged))
    assert not (merged / "adapter").exists()
    torch.testing.assert_close(logits(tuned), logits(folded), rtol=1e-5, atol=1e-5)
    assert (logits(folded) - logits(load_model(wide))).abs().max() > 1e-3


@pytest.mark.parametrize("way", [{"trainable": "lora"}, PREFIX], ids=str)
def test_a_model_in_16_bits_is_frozen_in_them_and_learns_what_a_wide_one_does(
    way: dict[str, Any], narrow: ModelSource, wide: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    found, held = [], []
    for name, source in (("narrow", narrow), ("wide", wide)):
        result, _ = run(Finetune(**FEW | way), source, text, tmp_path / name)
        found.append([result.metrics[part] for part in ("first_loss", "final_loss")])
        record = json.loads((tmp_path / name / "scratch" / "record.json").read_text())
        held.append(record["parameter_bytes"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    linears = [narrow.anatomy.linears[name] for name in as_stored_layers(narrow.anatomy)]
    assert len(linears) == 14
    # Biases, norms and embeddings are few, and wide while it trains.
    weights = sum(n.in_features * n.out_features for n in linears)
    assert held[1] - held[0] == 2 * weights
    memory = [Finetune(**FEW | way).forecast(outlook(wide, weight_bytes=b)).memory_bytes for b in (2.0, 4.0)]
    assert memory[1] - memory[0] >= 2 * weights - 4 * max(n.in_features * n.out_features for n in linears)


def test_zeros_are_not_held_by_an_adapter_that_is_kept_and_that_is_said(
    wide: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    layer = "model.layers.0.mlp.up_proj"
    lora = FEW | {"trainable": "lora", "steps": 1}
    said, _ = run(Finetune(**lora | KEPT), wide, text, tmp_path / "kept", layer)
    assert [line for line in said.warnings if "finish: merge keeps them" in line]
    silent, _ = run(Finetune(**lora), wide, text, tmp_path / "merged", layer)
    assert not [line for line in silent.warnings if "finish" in line]


def test_a_kept_adapter_is_published_loaded_by_peft_and_last(
    narrow: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    stage = ck.Finetune(**FEW, **KEPT, trainable="bottleneck")
    model = str(narrow.directory)
    plan = ck.plan(ck.Recipe(model=model, data=text, stages=(stage,)))
    assert "the bottleneck adapter stands beside it, in adapter/" in str(plan)
    ck.run(plan.recipe, tmp_path / "out", measures=())
    tuned: Any = ck.load(tmp_path / "out")
    assert type(tuned).__name__ == "PeftModelForCausalLM"
    assert tuned(input_ids=torch.arange(9)[None]).logits.dtype == torch.bfloat16
    with pytest.raises(PlanError, match="Put 1-finetune last"):
        ck.plan(ck.Recipe(model=model, data=text, stages=(stage, ck.Quantize("rtn"))))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainable": "prefix"}, ["s.finish", "finish merge of adapter prefix", "Set finish to adapter"]),
        ({"trainable": "bottleneck"}, ["s.finish", "adapter bottleneck", "use lora or dora"]),
        ({"trainable": "lora", "finish": "grid"}, ["s.finish: expected one of merge, adapter"]),
        ({"trainable": "lora", "dropout": 1.0}, ["s.dropout", "less than 1"]),
        (
            {"trainable": "prefix", "alpha": 8.0} | KEPT,
            ["s.alpha", "beside trainable prefix"],
        ),
        ({"finish": "adapter"}, ["s.finish", "nothing beside trainable all"]),
        (
            {"trainable": "prefix", "rank": 16, "context_length": 128} | KEPT,
            ["s.context_length", "16 tokens of prefix", "Set context_length to 112"],
        ),
        (
            {"trainable": "prefix", "activation_checkpointing": True} | KEPT,
            ["s.activation_checkpointing", "without recomputed activations"],
        ),
        (
            {"trainable": "bottleneck", "processes": 2, "pipeline_stages": 2, "micro_batch_size": 2} | KEPT,
            ["s.pipeline_stages", "rounds, adapts"],
        ),
        (
            {"trainable": "lora", "processes": 2, "strategy": "tp", "tensor_parallel": 2},
            ["s.tensor_parallel", "frozen"],
        ),
        ({"trainable": "bottleneck", "matmul": "int8"} | KEPT, ["s.matmul"]),
    ],
    ids=str,
)
def test_each_fault_is_told_with_its_cure(
    changes: dict[str, Any], expected: list[str], wide: ModelSource
) -> None:
    fields = {"context_length": 24, "rank": 4} if "trainable" in changes else {}
    said = "\n".join(map(str, Finetune(**fields | changes).faults(outlook(wide), "s")))
    assert all(part in said for part in expected), said


def test_every_adapter_as_it_stands_has_no_fault(wide: ModelSource) -> None:
    for name in ("lora", "dora", "bottleneck", "prefix"):
        assert Finetune(trainable=name, rank=4, context_length=24, **KEPT).faults(outlook(wide), "s") == []
    assert Finetune(trainable="dora", rank=4).faults(outlook(wide), "s") == []


def test_a_prefix_and_on_policy_and_adapters_of_encoders_are_refused(
    wide: ModelSource, tmp_path: Path
) -> None:
    prefix = {"trainable": "prefix", "rank": 4, "context_length": 24, **KEPT}
    said = "\n".join(map(str, Distill(**prefix, on_policy={"fraction": 0.5}).faults(outlook(wide), "s")))
    assert "which is a cache, beside on_policy" in said
    encoder = outlook(ModelSource(tiny_bert(tmp_path / "bert")))
    said = "\n".join(map(str, Distill(trainable="lora", rank=4, loss="pairwise").faults(encoder, "s")))
    assert "all where rows are sentences" in said


def test_memory_is_that_of_a_frozen_model_and_of_the_adapter_alone(wide: ModelSource) -> None:
    model = outlook(wide)
    whole = Finetune(**{k: v for k, v in FEW.items() if k != "rank"}).forecast(model)
    for way in ({"trainable": "bottleneck"} | KEPT, PREFIX):
        few = Finetune(**FEW | way).forecast(model)
        assert few.layers == 0
        (trained,) = [int(n.split()[0].replace(",", "")) for n in few.notes if "are trained" in n]
        # Weight, gradient and two moments of what trains; of the model its weights alone.
        assert whole.memory_bytes - few.memory_bytes == 12 * wide.anatomy.num_parameters - 16 * trained
    # QLoRA that freezes in no bits holds the same.
    lora = {"rank": 4, "context_length": 24}
    as_it_is = Qlora(**lora, base="none").forecast(outlook(wide, weight_bytes=2.0)).memory_bytes
    assert as_it_is < Qlora(**lora, base="none").forecast(model).memory_bytes
