"""Few parameters trained: what is refused and forecast, that nothing else moves, that zeros stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from broken import broken_off_in
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, outlook, stories, tiny_llama
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OlmoConfig,
    OlmoForCausalLM,
)

import compresskit as ck
from compresskit.data.spec import DataSpec
from compresskit.distill.finetune import Finetune
from compresskit.distill.stage import Distill
from compresskit.errors import PlanError
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.modeling.anatomy import anatomy_of
from compresskit.modeling.skeleton import skeleton
from compresskit.quant.qlora import Qlora
from compresskit.stage import StageContext, StageResult
from compresskit.training.adapters import outlook as adapters_outlook
from compresskit.training.adapters.trainable import Adapter
from compresskit.training.bias_norm import BiasNorm, biases_and_norms
from compresskit.training.retrain import _notes as retrain_notes
from compresskit.training.trainable import TRAINABLES, Share

FEW: dict[str, Any] = {"steps": 6, "batch_size": 4, "context_length": 24, "learning_rate": 1e-2}
LORA: dict[str, Any] = {"trainable": "lora", "rank": 4}
WAYS: dict[str, dict[str, Any]] = {"bias_norm": {"trainable": "bias_norm"}, "lora": LORA}


@dataclass(frozen=True)
class Kept:
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
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Has biases of every kind; of each group of four of its projections' weights two are zero."""
    place = tiny_llama(tmp_path_factory.mktemp("model"), attention_bias=True, mlp_bias=True)
    tensors = load_file(place / "model.safetensors")
    for name in (n for n in tensors if n.endswith("proj.weight")):
        groups = tensors[name].reshape(-1, 4)
        groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return open_model(str(place))


def projections(source: ModelSource) -> tuple[str, ...]:
    return tuple(name for name in source.anatomy.linears if name.endswith("proj"))


def run(stage: Any, source: ModelSource, text: DataSpec, place: Path) -> tuple[StageResult, ModelSource]:
    """The stage, all of whose projections' zeros were promised."""
    (place / "out").mkdir(parents=True, exist_ok=True)
    (place / "scratch").mkdir(exist_ok=True)
    context = StageContext(
        out=place / "out",
        scratch=place / "scratch",
        original=source.directory,
        data=text,
        device="cpu",
        cache=place / "cache",
        promises=tuple(map(Kept, projections(source))),
    )
    return stage.run(source, context), ModelSource(place / "out")


def moved(source: ModelSource, made: ModelSource) -> set[str]:
    return {name for name in source.names() if not torch.equal(source.tensor(name), made.tensor(name))}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainable": "lroa"}, ["s.trainable: expected one of all, bias_norm, lora", "Did you mean: lora?"]),
        ({"trainable": "lora", "rank": 20}, ["s.rank", "at least the rank, 20", "k_proj"]),
        ({"trainable": "lora", "rank": 0}, ["s.rank", "at least 1"]),
        ({**LORA, "alpha": 0.0}, ["s.alpha", "a number above 0"]),
        ({**LORA, "targets": "*.q_porj"}, ["s.targets", "matches none of", "q_proj"]),
        ({**LORA, "ignore": "Linear"}, ["at least one linear layer to work on", "narrow ignore"]),
        ({**LORA, "ignore": ()}, ["lm_head, which shares its weight", "Add lm_head to ignore"]),
        ({"rank": 8}, ["s.rank", "nothing beside trainable all", "set trainable to lora"]),
        ({"trainable": "bias_norm", "targets": "*.q_proj"}, ["s.targets", "beside trainable bias_norm"]),
        ({**LORA, "matmul": "int8"}, ["s.matmul", "without adapters"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Finetune, Distill])
def test_each_fault_is_told_with_its_cure(
    kind: type[Finetune | Distill], changes: dict[str, Any], expected: list[str], source: ModelSource
) -> None:
    said = "\n".join(map(str, kind(**changes).faults(outlook(source), "s")))
    assert all(part in said for part in expected), said


def test_ways_as_they_stand_have_no_fault(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in WAYS.values():
        assert Finetune(**way).faults(outlook(source), "s") == []
    assert Finetune(**LORA, optimizer="adamw_8bit").faults(outlook(source), "s") == []
    assert Finetune(optimizer="adamw_8bit").faults(outlook(source), "s") == []  # no zero is promised
    monkeypatch.setattr(adapters_outlook, "find_spec", lambda name: None)
    (fault,) = Finetune(**LORA).faults(outlook(source), "s")
    assert "the package peft" in str(fault)
    assert "pip install 'compresskit[qlora]'" in str(fault)


def test_a_layer_that_computes_otherwise_is_told_before(source: ModelSource) -> None:
    """Frozen it would compute as a plain one does, and be trained and merged as what it is not."""
    linears, name = dict(source.anatomy.linears), projections(source)[3]
    linears[name] = replace(linears[name], is_plain=False)
    odd = outlook(source, anatomy=replace(source.anatomy, linears=linears))
    for stage in (Finetune(**LORA), Qlora()):
        (fault,) = stage.faults(odd, "s")
        assert (fault.where, fault.got) == ("s.targets", name)
        assert replace(stage, ignore=(name, "lm_head")).faults(odd, "s") == []
    assert Finetune(trainable="bias_norm").faults(odd, "s") == []


def test_a_model_without_biases_and_norm_weights_is_refused(tmp_path: Path) -> None:
    config = OlmoConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    OlmoForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = outlook(open_model(str(tmp_path)))
    (fault,) = Finetune(trainable="bias_norm").faults(model, "s")
    assert (fault.where, fault.got, fault.cure) == (
        "s.trainable",
        "none in OlmoConfig",
        "Set trainable to lora.",
    )
    assert Finetune(**LORA).faults(model, "s") == []


def few_of(model: nn.Module) -> set[str]:
    """Biases, and whatever the modules that call themselves norms have."""
    norms = {n for n, m in model.named_modules() if "Norm" in type(m).__name__}
    names = dict(model.named_parameters())
    return {n for n in names if n.endswith("bias") or n.rpartition(".")[0] in norms}


def test_biases_and_norms_are_found_by_their_modules(source: ModelSource) -> None:
    few = few_of(skeleton(source))
    assert set(biases_and_norms(source.anatomy)) == few
    assert len(few) == 2 * (7 + 2) + 1
    config = CohereConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        use_qk_norm=True,
        eos_token_id=1,
    )

    with torch.device("meta"):
        heads = CohereForCausalLM(config)
    assert set(biases_and_norms(anatomy_of(heads))) == few_of(heads)
    assert any(len(p.shape) == 2 for n, p in heads.named_parameters() if n in few_of(heads))


@pytest.mark.parametrize("way", WAYS)
def test_nothing_else_moves_and_every_zero_stays(
    way: str, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    result, made = run(Finetune(**FEW, **WAYS[way], checkpoint_every=6), source, text, tmp_path)
    weights = {f"{layer}.weight" for layer in projections(source)}
    expected = few_of(skeleton(source)) if way == "bias_norm" else weights
    assert moved(source, made) == expected
    for name in weights:
        assert torch.equal(source.tensor(name) == 0, made.tensor(name) == 0), name
    metrics = result.metrics
    assert metrics["final_loss"] < metrics["first_loss"]
    assert metrics["validation_loss"] < metrics["validation_loss_before"]
    adapted = TRAINABLES[way](**TRAINABLES[way].options(Finetune(**WAYS[way]), source, stage_context(text)))
    trained = [p for p in adapted.load(source).parameters() if p.requires_grad]  # type: ignore[attr-defined]
    count = sum(p.numel() for p in trained)
    assert metrics["trained_parameters"] == count
    assert metrics["trained_fraction"] == count / source.anatomy.num_parameters
    states = torch.load(tmp_path / "scratch" / "checkpoints" / "checkpoint-6" / "optimizer.pt")["state"]
    assert sum(state["exp_avg"].numel() for state in states.values()) == count


def stage_context(text: DataSpec) -> StageContext:
    none = Path("unused")
    return StageContext(out=none, scratch=none, original=none, data=text, cache=none)


def test_all_says_how_many_and_what_was_before(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    whole, _ = run(Finetune(**FEW), source, text, tmp_path / "all")
    few, _ = run(Finetune(**FEW, **LORA), source, text, tmp_path / "lora")
    still, _ = run(Finetune(**FEW | {"steps": 1, "learning_rate": 1e-12}), source, text, tmp_path / "still")
    assert whole.metrics["trained_parameters"] == source.anatomy.num_parameters
    assert whole.metrics["trained_fraction"] == 1
    before = whole.metrics["validation_loss_before"]
    assert before == pytest.approx(few.metrics["validation_loss_before"], rel=1e-6)
    assert before == pytest.approx(still.metrics["validation_loss"], rel=1e-6)
    assert before > 1.01 * whole.metrics["validation_loss"]


def test_lora_is_to_the_byte_what_qlora_makes_of_weights_frozen_as_they_are(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    for alpha in (8.0, 24.0):
        fields = {**FEW, "rank": 4, "alpha": alpha}
        _, ours = run(Finetune(trainable="lora", **fields), source, text, tmp_path / f"ours{alpha}")
        _, theirs = run(Qlora(base="none", **fields), source, text, tmp_path / f"theirs{alpha}")
        one, two = (made.directory / "model.safetensors" for made in (ours, theirs))
        assert one.read_bytes() == two.read_bytes()


def test_what_was_trained_is_what_was_merged(source: ModelSource, text: DataSpec, tmp_path: Path) -> None:
    """The very model that was trained against the checkpoint it left, layer by layer without a mask too."""
    adapted = Adapter(
        adapter="lora",
        rank=4,
        alpha=8.0,
        dropout=0.0,
        finish="merge",
        targets=projections(source),
        held=projections(source)[3:],
        seed=0,
    )
    model: Any = adapted.load(source)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    (tmp_path / "out").mkdir()
    adapted.save(source, tmp_path / "out", {n: p.detach() for n, p in model.named_parameters()})
    made, ids = ModelSource(tmp_path / "out"), torch.arange(40, 56)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(made)(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    dense = projections(source)[0]
    assert not torch.equal(source.weight_OI(dense) == 0, made.weight_OI(dense) == 0)


def test_layers_that_store_their_weight_transposed_are_merged_so(text: DataSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=257)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    source = open_model(str(tmp_path / "gpt2"))
    for name, way in WAYS.items():
        assert Finetune(**way).faults(outlook(source), "s") == []
        result, made = run(Finetune(**FEW, **way), source, text, tmp_path / name)
        assert moved(source, made) == (
            few_of(skeleton(source))
            if name == "bias_norm"
            else {f"{layer}.weight" for layer in source.anatomy.linears if ".h." in layer}
        )
        assert result.metrics["validation_loss"] < result.metrics["validation_loss_before"]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_broken_off_ends_with_the_same_bytes(
    way: str, source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    stage = Finetune(**FEW, **WAYS[way], checkpoint_every=2)
    whole, one = run(stage, source, text, tmp_path / "whole")
    with broken_off_in(step=6):
        run(stage, source, text, tmp_path / "broken")
    again, two = run(stage, source, text, tmp_path / "broken")
    record = (tmp_path / "broken" / "scratch" / "record.json").read_text()
    assert '"resumed_from": 4' in record
    assert (one.directory / "model.safetensors").read_bytes() == (
        two.directory / "model.safetensors"
    ).read_bytes()
    assert whole == again, "the loss before the first step among the rest"


def test_the_forecast_has_no_states_for_what_is_frozen(source: ModelSource) -> None:
    model, every = outlook(source), source.anatomy.num_parameters
    whole, norms, lora = (Finetune(**FEW, **way).forecast(model) for way in ({}, *WAYS.values()))
    trained = sum(load_model(source).get_parameter(n).numel() for n in biases_and_norms(source.anatomy))
    assert whole.memory_bytes - norms.memory_bytes == 12 * (every - trained)
    assert lora.memory_bytes < whole.memory_bytes
    assert (whole.layers, norms.layers, lora.layers) == (15, 14, 14)
    assert any("bias_norm" in note and f"{trained:,}" in note for note in norms.notes)
    sharded = Finetune(**FEW, **LORA, processes=2, strategy="fsdp").forecast(model)
    assert sharded.memory_bytes < lora.memory_bytes
    taught = Distill(**FEW, **LORA).forecast(model)
    assert taught.memory_bytes - lora.memory_bytes == source.bytes


def test_a_share_above_all_of_the_model_is_told_in_plain_digits(source: ModelSource) -> None:
    """Factors of a high rank are more than the weights they update."""
    share = Share(trained=400, layers=1)
    (note,) = retrain_notes(Finetune(**LORA), share, replace(source.anatomy, num_parameters=200))
    assert note == "400 parameters are trained, 200% of the model's: lora."


def test_a_grid_in_force_is_refused_whatever_is_trained(
    source: ModelSource, text: DataSpec, tmp_path: Path
) -> None:
    for way in WAYS.values():
        stages = (ck.Quantize("rtn", scheme="w8a16"), ck.Finetune(**FEW, **way))
        with pytest.raises(PlanError, match="Put this stage before the quantisation"):
            ck.plan(ck.Recipe(model=str(source.directory), data=text, stages=stages))


@pytest.mark.parametrize("way", WAYS)
def test_a_pruned_model_is_taught_with_few_parameters_in_a_chain(
    way: str, text: DataSpec, tmp_path: Path
) -> None:
    model = tiny_llama(tmp_path / "model", initializer_range=0.2)
    stages = (ck.Prune("magnitude", pattern="2:4"), ck.Distill(**FEW | {"steps": 15}, **WAYS[way]))
    artifact = ck.run(ck.Recipe(model=str(model), data=text, stages=stages), tmp_path / "out", measures=())
    state = artifact.manifest["stages"][-1]
    assert state["checks"]["zeros"] == {"checked": 14, "kept": 14}
    metrics = state["result"]["metrics"]
    assert metrics["validation_loss"] < 0.97 * metrics["validation_loss_before"]
    assert metrics["trained_fraction"] < 0.5


def test_a_checkpoint_in_bf16_keeps_its_type_and_what_is_frozen(text: DataSpec, tmp_path: Path) -> None:
    source = open_model(str(tiny_llama(tmp_path / "model", dtype=torch.bfloat16)))
    for name, way in WAYS.items():
        _, made = run(Finetune(**FEW, **way), source, text, tmp_path / name)
        assert {made.dtype(n) for n in made.names()} == {torch.bfloat16}
        assert moved(source, made)
        assert "model.embed_tokens.weight" not in moved(source, made)


def test_the_plan_shows_what_is_trained(source: ModelSource, text: DataSpec) -> None:
    recipe = ck.Recipe(model=str(source.directory), data=text, stages=(ck.Finetune(**FEW, **LORA),))
    shown = str(ck.plan(recipe))
    assert "1-finetune     lora" in shown
    assert "parameters are trained" in shown
    assert replace(Finetune(), targets="a").targets == ("a",)
    assert BiasNorm.reads("bias_norm") == ()
