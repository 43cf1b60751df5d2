"""What a plan says zeros are worth: the right figures, for the runtime asked for, where they apply."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compresskit as ck
from compresskit.kernels.limits import BF16, FP32, INT4_G128, INT8, Values, ZeroLayout
from compresskit.planned import Plan
from compresskit.planner import plan
from compresskit.sparse.worth import Worth, bytes_each, joined, layout_of, short, usual_values
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("worth") / "model", dtype=torch.bfloat16, hidden_size=64))


def planned(model: str, *stages: Any, **recipe: Any) -> Plan:
    return plan(ck.Recipe(model=model, stages=stages, **recipe))


def notes(made: Plan, index: int = 0) -> tuple[str, str]:
    facts, advice = made.stages[index].forecast.notes
    return facts, advice


def test_half_of_bf16(model: str) -> None:
    made = planned(model, ck.Prune("magnitude", pattern="50%"))
    facts, advice = notes(made)
    assert facts == (
        "Zeros are stored as numbers, 2 bytes a weight, and transformers and vLLM multiply by them: neither "
        "smaller nor faster than dense, 1.00x. A kernel that reads them packed, which they have not, would "
        "need 1.125 bytes a weight (a bit says whether it is kept): at most 1.78x at batch 1."
    )
    assert advice == (
        "For speed: 8-bit weights (quantize, w8a8) give at most 2.00x, more than zeros can, where they are "
        "read as they are, as by vLLM and llama.cpp (with packed zeros 3.20x); cut (fewer layers, heads, "
        "neurons) is faster on every runtime."
    )
    assert f"1-prune: {facts}" in str(made)
    assert made.to_json()["stages"][0]["notes"] == [facts, advice]


def test_bytes_are_counted_in_words() -> None:
    said = ["1 byte a weight", "1.125 bytes a weight", "2 bytes a weight"]
    assert [bytes_each(number) for number in (1.0, 1.125, 2.0)] == said


def test_many_zeros_are_worth_more_than_eight_bits(model: str) -> None:
    facts, advice = notes(planned(model, ck.Prune("magnitude", pattern="70%")))
    assert "0.725 bytes a weight (a bit says whether it is kept): at most 2.76x" in facts
    assert "give at most 2.00x, where they are read as they are" in advice
    facts, _ = notes(planned(model, ck.Prune("magnitude", pattern="80%:layer")))
    assert "0.514 bytes a weight (4 bits for a kept one count the zeros before it): at most 3.89x" in facts


def test_two_of_four_names_its_hardware(model: str) -> None:
    facts, _ = notes(planned(model, ck.Prune("magnitude", pattern="2:4")))
    assert "1.125 bytes a weight (2 bits for a kept one say which of 4 it is): at most 1.78x" in facts
    assert "Sparse tensor cores multiply 2:4 faster in large batches" in facts
    assert "tensor cores" not in notes(planned(model, ck.Prune("magnitude", pattern="4:8")))[0]


def test_zeros_too_few_to_pay(model: str) -> None:
    facts, advice = notes(planned(model, ck.Prune("magnitude", pattern="5%")))
    assert "too few to pay for saying where they are" in facts
    assert "packed zeros" not in advice


def test_what_the_chain_ends_with_counts(model: str) -> None:
    made = planned(model, ck.Prune("magnitude", pattern="2:4"), ck.Quantize("rtn", scheme="w8a8"))
    facts, advice = notes(made)
    assert "1.031 bytes a weight" in facts, "8 bits, and a scale of 16 for 64 inputs"
    assert "0.656 bytes a weight" in facts
    assert "4-bit weights (quantize, w4a16-g128)" in advice
    assert made.stages[1].forecast.notes == (
        "Inputs of layers are rounded to 8 bits per token while the model runs, besides their weights.",
    )
    four = planned(model, ck.Prune("magnitude", pattern="2:4"), ck.Quantize("rtn", scheme="w4a16-g32"))
    assert notes(four)[1] == "For speed: cut (fewer layers, heads, neurons) is faster on every runtime."


def test_norms_of_another_dtype_are_no_part_of_a_weight(model: str, tmp_path: Path) -> None:
    copytree(model, tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    made = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(made, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    facts, _ = notes(planned(str(tmp_path / "mixed"), ck.Prune("magnitude", pattern="2:4")))
    assert "numbers, 2 bytes a weight, and" in facts
    assert "would need 1.125 bytes a weight" in facts


def test_the_runtime_that_the_recipe_exports_for(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.planner._export_faults", lambda *_: [])
    facts, _ = notes(planned(model, ck.Prune("magnitude"), export=("gguf",)))
    assert "and llama.cpp multiplies by them" in facts
    assert "which it has not," in facts
    facts, _ = notes(planned(model, ck.Prune("magnitude"), export=("gguf", "onnx")))
    assert "and llama.cpp and onnxruntime multiply by them" in facts


def test_stages_that_make_no_zeros_say_nothing(model: str) -> None:
    made = planned(model, ck.Prune("cut", options={"ffn": 0.5}), ck.Quantize("rtn", scheme="w8a16"))
    assert "Zeros are stored" not in str(made)


def test_training_that_makes_zeros_says_the_same(model: str) -> None:
    trained = planned(model, ck.SparseTrain(method="gradual", pattern="2:4", steps=1, context_length=16))
    assert " gradual 2:4 cross_entropy" in str(trained)
    assert set(notes(planned(model, ck.Prune("magnitude", pattern="2:4")))) <= set(
        trained.stages[0].forecast.notes
    )


def test_a_runtime_that_packs_is_not_told_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.kernels.limits.PACKED_BY", {"ours": ("mask",)})
    worth = Worth(ZeroLayout(zero_fraction=0.5), BF16, ("ours",))
    assert worth.as_stored() == "As numbers, zeros take 2 bytes a weight like any other weight."
    assert worth.at_best().startswith(
        "ours reads them packed, 1.125 bytes a weight (a bit says whether it is kept): at most 1.78x at batch"
    )
    both = Worth(ZeroLayout(zero_fraction=0.5), BF16, ("llama.cpp", "ours"))
    assert "and llama.cpp multiplies by them" in both.as_stored()
    assert both.at_best() == worth.at_best()
    few = Worth(ZeroLayout(zero_fraction=0.05), BF16, ("ours",))
    assert few.slow == ("ours",)
    assert "too few to pay" in few.at_best()


def test_layouts_and_means() -> None:
    assert layout_of("2:4") == ZeroLayout(zero_fraction=0.5, group=(2, 4))
    assert layout_of("60%:layer") == ZeroLayout(zero_fraction=0.6)
    assert usual_values([(FP32, 10), (INT8, 30), (Values(8, 1.0), 10)]) == Values(8, 0.25)
    assert usual_values([(INT4_G128, 1)]) == INT4_G128
    assert (short(2.0), short(1.125), short(0.3906)) == ("2", "1.125", "0.391")
    assert (joined(["a"]), joined(["a", "b"]), joined(["a", "b", "c"])) == ("a", "a and b", "a, b and c")
