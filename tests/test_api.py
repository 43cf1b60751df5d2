"""The Python face: on a path, on a live module, on what came out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compresskit as ck
from compresskit.errors import InputError
from tests.tiny import tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(f"The {n}th paragraph of {n * n}." for n in range(300)))
    return tiny_llama(tmp_path / "model")


def test_a_live_module_is_compressed_in_place_and_stays_the_same_object(model: Path, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = {name: p.detach().clone() for name, p in live.named_parameters()}
    data = str(tmp_path / "text.txt")
    stages = [ck.Prune("wanda", pattern="2:4", samples=4), ck.Quantize("rtn", scheme="w8a16")]
    assert ck.compress(live, stages, tokenizer=tokenizer, data=data) is None
    for name, weight in live.named_parameters():
        if name.endswith("_proj.weight"):
            assert ((weight == 0).reshape(-1, 4).sum(1) >= 2).all()
            assert len(weight[0].unique()) <= 255
        else:
            assert torch.equal(weight, dense[name])
    assert live.generate(torch.tensor([[256, 60]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_a_live_module_is_left_alone_when_the_result_goes_to_a_directory(model: Path, tmp_path: Path) -> None:
    live = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    cut = ck.Prune("cut", options={"ffn": 0.5})
    with pytest.raises(InputError, match="out=DIRECTORY"):
        ck.compress(live, [cut], tokenizer=tokenizer)
    artifact = ck.compress(live, [cut], tokenizer=tokenizer, out=tmp_path / "out")
    assert artifact is not None
    assert live.config.intermediate_size == 64
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 32


def test_run_measures_reports_and_loads(model: Path, tmp_path: Path) -> None:
    recipe = ck.Recipe(
        model=str(model),
        data=str(tmp_path / "text.txt"),
        stages=[ck.Prune("magnitude"), ck.Quantize("rtn", scheme="w8a8")],
    )
    assert "magnitude 50%" in str(ck.plan(recipe))
    artifact = ck.run(recipe, tmp_path / "out")
    shown = str(ck.report(artifact))
    for part in ("original", "prune", "quantize", "50.0%", "bits per byte"):
        assert part in shown
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[256, 65, 66, 67]])
    with torch.no_grad():
        torch.testing.assert_close(ck.load(tmp_path / "out")(ids).logits, plain(ids).logits)
    assert ck.open_artifact(tmp_path / "out").damaged() == ()


def test_bench_names_directories_apart(model: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "elsewhere" / "model", num_hidden_layers=1)
    records = ck.bench(model, other, measures=("size",))
    assert [r.subject for r in records] == [str(model), str(other)]
    assert records[0].values["num_parameters"] > records[1].values["num_parameters"]
    with pytest.raises(InputError, match="speed"):
        ck.bench(model, measures=("speed",))


def test_public_names_are_all_there_and_nothing_else() -> None:
    assert sorted(ck.__all__) == ck.__all__
    assert all(getattr(ck, name) is not None for name in ck.__all__)
    with pytest.raises(AttributeError):
        ck.no_such_name  # noqa: B018
