"""Every adapter on every base trains itself alone, and each finish is what its name says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIELDS, Train, projections
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from compresskit.formats.grid import GRIDS_FILE, write_grids
from compresskit.modeling import ModelSource, load_model
from compresskit.quant.affine import grid_for
from compresskit.quant.promise import OnGrid
from compresskit.quant.scheme import parse
from compresskit.sparse.promise import Zeros
from compresskit.training.adapters.attach import with_adapter
from compresskit.training.adapters.bits import rounded
from compresskit.training.write import write_checkpoint

# peft asks transformers by an old name; compresskit.training.adapters.attach says the same.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

KINDS = [
    ("lora", "nf4", "merge"),
    ("lora", "int8", "merge"),
    ("dora", "nf4", "merge"),
    ("dora", "none", "adapter"),
    ("lora", "none", "adapter"),
    ("prefix", "nf4", "adapter"),
    ("bottleneck", "none", "adapter"),
]
OWN = ("lora_", "bottleneck_", "prefix_encoder")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(40, 56)[None]).logits
    return found


@pytest.mark.parametrize(("adapter", "base", "finish"), KINDS)
def test_an_adapter_trains_and_nothing_else_moves(
    dense: ModelSource, train: Train, adapter: str, base: str, finish: str
) -> None:
    # A prefix moves a random model little.
    fields = replace(FIELDS, steps=20, learning_rate=0.3) if adapter == "prefix" else FIELDS
    done = train(dense, fields=fields, adapter=adapter, base=base, finish=finish)
    assert done.outcome.final_loss < done.outcome.first_loss
    trained = {n for n, p in done.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(any(own in n for own in OWN) for n in trained)
    assert any(not torch.equal(done.before[n], t) for n, t in done.model.state_dict().items() if n in trained)
    after = done.model.state_dict()
    assert all(torch.equal(done.before[n], after[n]) for n in after if n not in trained)
    assert not [n for n, p in done.model.named_parameters() if p.grad is not None and n not in trained]
    made = ModelSource(done.out)
    if finish == "merge":
        assert (logits(load_model(made)) - logits(done.model)).abs().max() < (
            0.05 if base == "int8" else 1e-4
        )
        same = [n for n in made.names() if "proj" not in n]
    else:
        same = list(made.names())
        if base == "none" and adapter != "prefix":
            tuned = with_adapter(load_model(made), done.out)
            torch.testing.assert_close(logits(tuned), logits(done.model), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(made.tensor(n), dense.tensor(n)) for n in same)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_kept_adapter_merges_in_plain_peft_to_what_merge_gives(
    dense: ModelSource, train: Train, adapter: str
) -> None:
    kept = train(dense, adapter=adapter, base="none", finish="adapter", out="kept")
    folded = train(dense, adapter=adapter, base="none", finish="merge", out="folded")
    theirs = PeftModel.from_pretrained(load_model(dense), kept.out / "adapter").merge_and_unload()
    ours = ModelSource(folded.out)
    for name, tensor in theirs.state_dict().items():
        if name in ours:
            torch.testing.assert_close(ours.tensor(name), tensor, rtol=0, atol=1e-6)


def test_a_new_adapter_starts_as_peft_starts_it(dense: ModelSource, train: Train) -> None:
    """On a dense model that nothing is held in, training is peft's own to the bit."""
    done = train(dense, base="none", dropout=0.0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(projections(dense)), task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = get_peft_model(load_model(dense), config).state_dict()
    names = [n for n in done.before if "lora_" in n]
    assert names
    assert all(torch.equal(done.before[n], theirs[f"base_model.model.{n}"]) for n in names)


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "nf4"},
        {"base": "int8"},
        {"base": "none", "adapter": "dora"},
        {"base": "nf4", "loftq_rounds": 2},
        {"base": "nf4", "merge_into": "original"},
    ],
    ids=str,
)
def test_a_merge_keeps_every_zero_of_a_pruned_model(
    pruned: ModelSource, train: Train, changes: dict[str, Any]
) -> None:
    layers = projections(pruned)
    done = train(pruned, held=layers, **changes)
    made = ModelSource(done.out)
    two_four = [n for i, n in enumerate(sorted(layers)) if i % 2]
    for layer in layers:
        pattern = "2:4" if layer in two_four else "0.1"
        assert Zeros(layer, pattern).broken(pruned, made) == ()
        assert not torch.equal(made.weight_OI(layer), pruned.weight_OI(layer))
    if changes.get("merge_into") != "original" and changes["base"] != "int8":
        torch.testing.assert_close(logits(load_model(made)), logits(done.model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("held", [True, False], ids=["held", "free"])
@pytest.mark.parametrize("base", ["nf4", "int8", "none"])
def test_dora_trains_around_rows_of_zeros(
    dense: ModelSource, train: Train, tmp_path: Path, base: str, held: bool
) -> None:
    layers, place = projections(dense), tmp_path / "dead"
    tensors = {n: dense.tensor(n).clone() for n in dense.names()}
    for layer in layers:
        tensors[f"{layer}.weight"][[1, 5]] = 0
    place.mkdir()
    write_checkpoint(dense, place, tensors)
    source = ModelSource(place)
    done = train(source, adapter="dora", base=base, held=layers if held else ())
    made = ModelSource(done.out)
    assert done.outcome.final_loss < done.outcome.first_loss
    for layer in layers:
        assert (made.weight_OI(layer)[[1, 5]] == 0).all()
        assert not torch.equal(made.weight_OI(layer), source.weight_OI(layer))
    if base == "none":
        torch.testing.assert_close(logits(load_model(made)), logits(done.model), rtol=1e-4, atol=1e-4)


def test_merging_into_the_original_adds_the_update_to_the_unrounded_weight(
    dense: ModelSource, train: Train
) -> None:
    trained = ModelSource(train(dense, out="trained").out)
    original = ModelSource(train(dense, merge_into="original", out="original").out)
    for layer in projections(dense):
        weight_OI = dense.weight_OI(layer)
        shift_OI = original.weight_OI(layer) - trained.weight_OI(layer)
        torch.testing.assert_close(shift_OI, weight_OI - rounded(weight_OI, "nf4"), rtol=0, atol=1e-6)


def test_loftq_starts_nearer_to_the_model_than_plain_rounding(dense: ModelSource, train: Train) -> None:
    fields = replace(FIELDS, steps=1, learning_rate=1e-12)
    target = logits(load_model(dense))
    plain = logits(load_model(train(dense, fields=fields, out="plain").out))
    near = logits(load_model(train(dense, fields=fields, loftq_rounds=3, rank=8, out="near").out))
    assert (near - target).norm() < 0.8 * (plain - target).norm()


@pytest.fixture
def gridded(tmp_path: Path, pruned: ModelSource) -> ModelSource:
    """The pruned model, all projections but two on grids of 4 bits."""
    place = tmp_path / "gridded"
    place.mkdir()
    layers = projections(pruned)[2:]
    tensors = {n: pruned.tensor(n) for n in pruned.names()}
    grids = {layer: grid_for(pruned.weight_OI(layer), parse("w4a16-g16")) for layer in layers}
    for layer, grid in grids.items():
        tensors[f"{layer}.weight"] = grid.snap(tensors[f"{layer}.weight"])
    write_checkpoint(pruned, place, tensors)
    write_grids(place, grids)
    return ModelSource(place)


def test_a_finish_on_the_grid_keeps_every_grid_and_every_zero(gridded: ModelSource, train: Train) -> None:
    layers = projections(gridded)
    fields = replace(FIELDS, steps=20, learning_rate=3e-2)
    done = train(gridded, fields=fields, finish="grid", base="nf4", held=layers)
    made = ModelSource(done.out)
    assert (done.out / GRIDS_FILE).read_bytes() == (gridded.directory / GRIDS_FILE).read_bytes()
    moved = 0
    for layer in layers:
        assert ((gridded.weight_OI(layer) == 0) <= (made.weight_OI(layer) == 0)).all()
        if gridded.grid(layer) is not None:
            assert OnGrid(layer, "w4a16-g16").broken(gridded, made) == ()
            moved += int((made.weight_OI(layer) != gridded.weight_OI(layer)).sum())
    assert moved > 100
    # What was trained is what was merged: the rounding stood in the forward pass.
    torch.testing.assert_close(logits(load_model(made)), logits(done.model), rtol=1e-4, atol=1e-4)
    assert done.outcome.final_loss < done.outcome.first_loss


def test_a_restart_continues_to_the_same_adapter(dense: ModelSource, train: Train, tmp_path: Path) -> None:
    fields = replace(FIELDS, steps=6, checkpoint_every=2)
    whole = load_file(train(dense, fields=fields, out="whole").out / "model.safetensors")
    scratch = tmp_path / "whole-scratch" / "checkpoints"
    last = scratch / "checkpoint-6"
    assert {p.name for p in last.iterdir()} >= {"trained.safetensors"}
    assert not list(scratch.rglob("model.safetensors"))
    done = train(dense, fields=fields, out="again", resume_scratch=tmp_path / "whole-scratch")
    assert done.outcome.resumed_from == 6
    again = load_file(done.out / "model.safetensors")
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_checkpointed_activations_change_nothing(pruned: ModelSource, train: Train) -> None:
    fields = replace(FIELDS, steps=3)
    held = projections(pruned)
    plain = train(pruned, fields=fields, held=held, out="plain")
    fields = replace(fields, activation_checkpointing=True)
    again = train(pruned, fields=fields, held=held, out="again")
    assert again.outcome.final_loss == pytest.approx(plain.outcome.final_loss, rel=1e-6)


@pytest.mark.parametrize("base", ["nf4", "none"])
def test_layers_that_store_their_weight_transposed_are_merged_so(
    train: Train, tmp_path: Path, base: str
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=257)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    source = ModelSource(tmp_path / "gpt2")
    layers = tuple(name for name in source.anatomy.linears if ".h." in name)
    assert layers
    assert all(source.anatomy.linears[name].transposed for name in layers)
    done = train(source, base=base, targets=layers, held=layers)
    made = load_model(ModelSource(done.out))
    torch.testing.assert_close(logits(made), logits(done.model), rtol=1e-4, atol=1e-4)
    if base == "none":
        kept = train(source, base=base, targets=layers, finish="adapter", out="kept")
        tuned = with_adapter(load_model(source), kept.out)
        torch.testing.assert_close(logits(tuned), logits(kept.model), rtol=1e-4, atol=1e-4)


def test_bf16_and_8_bit_states_train_too(pruned: ModelSource, train: Train) -> None:
    for adapter, finish in (("lora", "merge"), ("prefix", "adapter"), ("dora", "merge")):
        fields = replace(FIELDS, steps=3, precision="bf16", optimizer="adamw_8bit")
        done = train(
            pruned,
            fields=fields,
            adapter=adapter,
            finish=finish,
            precision="bf16",
            held=projections(pruned),
            out=adapter,
        )
        assert done.outcome.steps == 3


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_held_model_stored_in_bf16_runs_before_it_is_widened(
    train: Train, tmp_path: Path, adapter: str
) -> None:
    source = ModelSource(tiny_llama(tmp_path / "bf16", dtype=torch.bfloat16))
    layers = projections(source)
    adapted = replace(train(source, held=layers, adapter=adapter, base="none").adapted)
    assert logits(adapted.load(source)).isfinite().all()
