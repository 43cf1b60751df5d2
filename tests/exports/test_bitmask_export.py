"""Zeros as bits: what is packed, what stays dense and says so, the bytes that a plan tells, the way back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import compresskit as ck
from compresskit.errors import FormatError, ModelError, PlanError
from compresskit.formats.bitmask import layers_of
from compresskit.formats.checkpoint import write_shards
from compresskit.formats.shards import read_header
from compresskit.modeling import ModelSource, copy_sidecars, open_model
from compresskit.modeling.packed import unpacked
from tests.exports.models import on_grids
from tests.tiny import byte_tokenizer, tiny_llama


def with_zeros(source: ModelSource, out: Path, share: float = 0.6, only: str = "proj") -> ModelSource:
    """``source`` with a share of zeros in the layers that ``only`` is in the name of."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: source.tensor(name) for name in source.names()}
    for layer in source.anatomy.linears:
        if only in layer:
            weight = tensors[f"{layer}.weight"]
            weight[torch.rand(weight.shape, generator=generator) < share] = 0
    out.mkdir()
    write_shards(out, tensors.items())
    copy_sidecars(source.directory, out)
    return open_model(out)


def tensor_bytes(directory: Path) -> int:
    return sum(p.num_bytes for f in directory.glob("*.safetensors") for p in read_header(f).values())


def layers_in(directory: Path) -> dict[str, object]:
    config = json.loads((directory / "config.json").read_text())
    return dict(layers_of(config["quantization_config"]))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    place = tmp_path_factory.mktemp("dense") / "model"
    return open_model(tiny_llama(place, hidden_size=64, dtype=torch.bfloat16, attention_bias=True))


def same_model(back: ModelSource, made: ModelSource) -> None:
    assert back.names() == made.names()
    for name in made.names():
        assert torch.equal(back.tensor(name), made.tensor(name)), name
        assert back.dtype(name) == made.dtype(name)
        assert back.shape(name) == made.shape(name)


def test_what_is_packed_reads_as_the_dense_model_it_was_made_from(dense: ModelSource, tmp_path: Path) -> None:
    made = with_zeros(dense, tmp_path / "made")
    (said,) = ck.export(made.directory, to="bitmask", out=tmp_path / "out")
    assert said == "1 linear layer stays dense, shared with another module, which needs it dense: lm_head."
    same_model(unpacked(open_model(tmp_path / "out")), made)
    layers = layers_in(tmp_path / "out")
    assert len(layers) == 14
    kept = sum(int(made.tensor(f"{n}.weight").count_nonzero()) for n in layers)
    weights = sum(made.tensor(f"{n}.weight").numel() for n in layers)
    plain = sum(made.place(n).num_bytes for n in made.names()) - 2 * weights
    assert tensor_bytes(tmp_path / "out") == plain + 2 * kept + weights // 8 + 16 * 14
    ck.export(tmp_path / "out", to="bitmask", out=tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    ck.export(tmp_path / "out", to="dense", out=tmp_path / "plain")
    same_model(open_model(tmp_path / "plain"), made)
    assert not open_model(tmp_path / "plain").is_compressed


def test_layers_whose_zeros_do_not_pay_stay_dense_and_that_is_said(
    dense: ModelSource, tmp_path: Path
) -> None:
    made = with_zeros(dense, tmp_path / "made", only="down_proj")
    (said,) = ck.export(made.directory, to="bitmask", out=tmp_path / "out")
    assert "12 linear layers stay dense, too few zeros to pay for saying where they are: " in said
    assert set(layers_in(tmp_path / "out")) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    same_model(unpacked(open_model(tmp_path / "out")), made)
    (told,) = ck.export(dense.directory, to="bitmask", out=tmp_path / "none")
    assert told.startswith("Nothing is packed, and what was written is dense. 14 linear")
    assert not open_model(tmp_path / "none").is_compressed
    same_model(open_model(tmp_path / "none"), dense)


def test_patterns_are_found_and_said(dense: ModelSource, tmp_path: Path) -> None:
    recipe = ck.Recipe(model=str(dense.directory), stages=(ck.Prune("magnitude", pattern="2:4"),))
    ck.run(recipe, tmp_path / "made", measures=())
    ck.export(tmp_path / "made", to="bitmask", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {layer.pattern for layer in layers_of(config).values()} == {"2:4"}
    assert config["ignore"] == ["lm_head"]
    entry = config["layers"]["model.layers.0.mlp.down_proj"]
    assert entry == {"shape": [64, 64], "kept": 2048, "dtype": "bfloat16", "pattern": "2:4"}


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32"])
def test_integers_stay_integers(dense: ModelSource, scheme: str, tmp_path: Path) -> None:
    stage = on_grids(with_zeros(dense, tmp_path / "made"), tmp_path / "stage", {"proj": scheme})
    said = ck.export(stage.directory, to="bitmask", out=tmp_path / "out")
    back = unpacked(open_model(tmp_path / "out"))
    same_model(back, stage)
    stored = read_header(tmp_path / "out" / "model.safetensors")
    for layer in layers_in(tmp_path / "out"):
        was, now = stage.grid(layer), back.grid(layer)
        assert was is not None
        assert now is not None
        assert (now.activation_bits, now.bits, now.group_size) == (None, was.bits, was.group_size)
        assert torch.equal(now.scale_OG, was.scale_OG)
        assert stored[f"{layer}.values"].dtype == torch.int8
        q = was.quantize(stage.weight_OI(layer))
        assert torch.equal(stored[f"{layer}.values"].read(), q[q != 0])
    assert any("inputs of 14 layers are rounded no more" in text for text in said) == (scheme == "w8a8")
    assert any("integers of 14 layers, of fewer than 8 bits" in text for text in said) == ("w4" in scheme)
    ck.export(tmp_path / "out", to="compressed-tensors", out=tmp_path / "packed")
    again = unpacked(open_model(tmp_path / "packed"))
    assert all(torch.equal(again.tensor(name), stage.tensor(name)) for name in stage.names())


def test_grids_that_have_no_plain_integers_are_refused(dense: ModelSource, tmp_path: Path) -> None:
    for scheme in ("fp8", "w4a16-g32-asym", "nf4"):
        stage = on_grids(dense, tmp_path / scheme, {"down_proj": scheme})
        with pytest.raises(
            FormatError, match=rf"expected symmetric integers, got {scheme} in model.layers.0"
        ):
            ck.export(stage.directory, to="bitmask", out=tmp_path / "out")
    stages = (ck.Prune("magnitude"), ck.Quantize("rtn", scheme="fp8"))
    recipe = ck.Recipe(model=str(dense.directory), stages=stages, export=("bitmask",))
    with pytest.raises(PlanError, match="export: bitmask: expected symmetric integers, got fp8"):
        ck.plan(recipe)


def test_gpt2_stores_its_layers_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    made = with_zeros(open_model(tmp_path / "gpt2"), tmp_path / "made", only="c_")
    ck.export(made.directory, to="bitmask", out=tmp_path / "out")
    back = unpacked(open_model(tmp_path / "out"))
    assert all(torch.equal(back.tensor(name), made.tensor(name)) for name in made.names())
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["layers"]
    assert entry["transformer.h.0.attn.c_attn"]["shape"] == [96, 32]
    assert entry["transformer.h.0.attn.c_attn"]["transposed"] is True


def test_types_that_no_layout_holds_stay_dense(tmp_path: Path) -> None:
    wide = open_model(tiny_llama(tmp_path / "wide", dtype=torch.float64))
    made = with_zeros(wide, tmp_path / "made")
    (said,) = ck.export(made.directory, to="bitmask", out=tmp_path / "out")
    assert "14 linear layers stay dense, of float64, which no layout holds" in said
    same_model(open_model(tmp_path / "out"), made)


PLANNED = re.compile(r"export bitmask: (at most |about )?([\d,]+) bytes of weights, [\d.]+x of the ([\d,]+)")


@pytest.mark.parametrize(
    "stages",
    [
        (ck.Prune("magnitude", pattern="60%"),),
        (ck.Prune("magnitude", pattern="70%:layer"),),
        (ck.Prune("magnitude", pattern="3:7", on_indivisible="pad"),),
        (ck.Prune("magnitude", pattern="50%:8x16"),),
        (ck.Prune("magnitude", pattern="2:4"), ck.Prune("magnitude", pattern="75%", targets=("*down_proj",))),
        (ck.Prune("cut", options={"ffn": 0.5}), ck.Prune("magnitude", pattern="60%")),
        (ck.Prune("magnitude", pattern="50%"), ck.Quantize("rtn", scheme="w8a16-g32")),
    ],
    ids=["row", "layer", "padded", "block", "two", "cut", "int8"],
)
def test_the_plan_tells_the_bytes_that_come_out(
    dense: ModelSource, stages: tuple[ck.Prune, ...], tmp_path: Path
) -> None:
    recipe = ck.Recipe(model=str(dense.directory), stages=stages, export=("bitmask",))
    plan = ck.plan(recipe)
    found = PLANNED.search(str(plan))
    assert found, str(plan)
    bound, told, told_dense = found[1], int(found[2].replace(",", "")), int(found[3].replace(",", ""))
    artifact = ck.run(plan, tmp_path / "out", measures=())
    came_out = tensor_bytes(tmp_path / "out" / "exports" / "bitmask")
    if len(stages) > 1 and stages[1].kind == "quantize":
        assert bound == "at most "
        assert 0.9 * told < came_out <= told, "what rounds to zero is not kept"
    else:
        assert bound is None
        assert came_out == told
        assert tensor_bytes(tmp_path / "out") == told_dense
    assert any(text.startswith("exports/bitmask: 1 linear") for text in artifact.manifest["warnings"])


def test_the_plan_counts_what_earlier_stages_promised(dense: ModelSource, tmp_path: Path) -> None:
    prune = ck.Recipe(model=str(dense.directory), stages=(ck.Prune("magnitude", pattern="60%"),))
    ck.run(prune, tmp_path / "first", measures=())
    again = ck.Recipe(model=str(tmp_path / "first"), stages=(), export=("bitmask",))
    found = PLANNED.search(str(ck.plan(again)))
    ck.run(again, tmp_path / "out", measures=())
    assert found
    assert found[2] == f"{tensor_bytes(tmp_path / 'out' / 'exports' / 'bitmask'):,}"
    plain = ck.plan(ck.Recipe(model=str(dense.directory), stages=(), export=("bitmask",)))
    assert "bytes of weights; nothing is packed: too few zeros." in str(plain)
    owl = ck.Prune("magnitude", pattern="60%", allocation="global")
    told = str(ck.plan(ck.Recipe(model=str(dense.directory), stages=(owl,), export=("bitmask",))))
    assert "export bitmask: about " in told


Harm = Callable[[Path], object]


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def reheaded(**changes: object) -> Harm:
    """Change the header's entry of one mask."""

    def harm(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header["model.layers.0.mlp.down_proj.mask"].update(changes)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return harm


def reconfigured(path: Path) -> None:
    config = json.loads((path.parent / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.down_proj"]["kept"] += 1
    (path.parent / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (shortened, "bytes as its header says, got"),
        (reheaded(data_offsets=[10**9, 10**9 + 512]), "bytes as its header says, got"),
        (reheaded(data_offsets=[0, 100]), "bytes for model.layers.0.mlp.down_proj.mask, got 100 bytes"),
        (reheaded(data_offsets=[512, 0]), "bytes for model.layers.0.mlp.down_proj.mask, got -512 bytes"),
        (reheaded(dtype="I8"), "down_proj mask: expected uint8 of .64, 8. as config.json says, got int8"),
        (reheaded(shape=[8, 64]), "down_proj mask: expected uint8 of .64, 8. as config.json says"),
        (reconfigured, "down_proj values: expected bfloat16 of"),
    ],
)
def test_damaged_files_are_told(dense: ModelSource, harm: Harm, told: str, tmp_path: Path) -> None:
    made = with_zeros(dense, tmp_path / "made")
    ck.export(made.directory, to="bitmask", out=tmp_path / "out")
    harm(tmp_path / "out" / "model.safetensors")
    with pytest.raises((FormatError, ModelError), match=told):
        ck.export(tmp_path / "out", to="dense", out=tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_layer_that_multiplies_in_its_own_way_stays_dense(dense: ModelSource) -> None:
    from compresskit.exports.bitmask import refusal
    from compresskit.modeling.anatomy import anatomy_of

    class Odd(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    linears = anatomy_of(nn.Sequential(Odd(4, 4), nn.Linear(4, 4))).linears
    assert [refusal(linear) for linear in linears.values()] == [
        "of a class that multiplies in a way of its own",
        "",
    ]


def test_what_was_packed_is_read_back(
    dense: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_zeros(dense, tmp_path / "made")

    def damage(out: Path, tensors: object, **rest: object) -> None:
        write_shards(out, ((n, -t if n.endswith("up_proj.values") else t) for n, t in tensors), **rest)

    monkeypatch.setattr("compresskit.exports.bitmask.write_shards", damage)
    with pytest.raises(FormatError, match=r"2 that differ and 0 missing: model.layers.0.mlp.up_proj.weight"):
        ck.export(made.directory, to="bitmask", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
