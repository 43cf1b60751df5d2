"""What units and blocks are worth, against the slow way: the whole model, plain hooks, sums by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresskit.data.spec import DataSpec
from compresskit.errors import DataError, UnknownMethodError
from compresskit.modeling import ModelSource, load_model, open_model
from compresskit.sparse.stage import Prune
from compresskit.sparse.structured import IMPORTANCES
from compresskit.sparse.structured.base import Scores, Subject
from compresskit.sparse.structured.surgery import choose
from compresskit.stage import StageContext
from tests.sparse.structured.zoo import FAMILIES, build, follows, kept_by, outlook, planned
from tests.tiny import tiny_llama

ROWS = [{"input_ids": torch.arange(3 + 5 * n, 3 + 5 * n + length)} for n, length in enumerate((7, 12, 7))]
PADDED = [{"input_ids": torch.arange(3, 15), "attention_mask": torch.arange(12) < 9}]
# Layers that read the hidden channels, one of those that read the same.
READ = {
    "LlamaForCausalLM": ("self_attn.q_proj", "mlp.up_proj"),
    "Gemma2ForCausalLM": ("self_attn.q_proj", "mlp.up_proj"),
    "GPT2LMHeadModel": ("attn.c_attn", "mlp.c_fc"),
    "OPTForCausalLM": ("self_attn.q_proj", "fc1"),
    "BertForMaskedLM": ("attention.self.query", "intermediate.dense"),
}


def scores(model: ModelSource, importance: str, rows: Any = None) -> Scores:
    name = model.config.architectures[0]
    heads = {} if follows(name) else {"heads": 0.5}
    surgery = planned(model, ffn=0.5, hidden=0.5, **heads)
    subject = Subject(model=model, dimensions=surgery.dimensions, rows=rows)
    return IMPORTANCES[importance]().measure(subject)


def watched(
    model: ModelSource, names: list[str], rows: Any
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """What the modules called ``names`` are given and give, (tokens, features), over all documents."""
    whole = load_model(model)
    given: dict[str, list[Tensor]] = {name: [] for name in names}
    made: dict[str, list[Tensor]] = {name: [] for name in names}
    keep: list[Tensor] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            result = output if isinstance(output, Tensor) else output[0]
            given[name].append(hidden.reshape(-1, hidden.shape[-1])[keep[0]])
            made[name].append(result.reshape(-1, result.shape[-1])[keep[0]])

        return hook

    for name in names:
        whole.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True)
    with torch.no_grad():
        for row in rows:
            mask = row.get("attention_mask", torch.ones_like(row["input_ids"]))
            keep[:] = [mask.bool()]
            whole(input_ids=row["input_ids"][None], attention_mask=mask[None])
    return whole, {n: torch.cat(x) for n, x in given.items()}, {n: torch.cat(x) for n, x in made.items()}


@pytest.mark.parametrize("rows", [ROWS, PADDED], ids=["rows", "padded"])
@pytest.mark.parametrize("name", READ)
def test_activation_is_the_mean_of_what_layers_read(name: str, rows: Any, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    _, reader, _, attention, _ = FAMILIES[name]
    found = scores(model, "activation", rows)
    blocks = model.anatomy.blocks
    names = [f"{block}.{layer}" for block in blocks for layer in (reader, attention, *READ[name])]
    _, given, _ = watched(model, names, rows)
    hidden = torch.zeros(32, dtype=torch.float64)
    for index, block in enumerate(blocks):
        neurons = given[f"{block}.{reader}"].double().abs().mean(0)
        torch.testing.assert_close(found.units["ffn"][index], neurons, rtol=1e-4, atol=1e-7)
        outputs = given[f"{block}.{attention}"].double().abs().mean(0)
        groups = outputs.view(found.units["heads"].shape[1], -1).sum(1)
        torch.testing.assert_close(found.units["heads"][index], groups, rtol=1e-4, atol=1e-7)
        for layer in READ[name]:
            hidden += given[f"{block}.{layer}"].double().abs().mean(0)
    torch.testing.assert_close(found.units["hidden"], hidden, rtol=1e-4, atol=1e-7)
    assert found.num_tokens == (26 if rows is ROWS else 9)


@pytest.mark.parametrize("rows", [ROWS, PADDED], ids=["rows", "padded"])
@pytest.mark.parametrize("name", READ)
def test_a_block_is_worth_how_far_it_turns_its_input(name: str, rows: Any, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    found = scores(model, "activation", rows).blocks_L
    _, given, made = watched(model, list(model.anatomy.blocks), rows)
    for index, block in enumerate(model.anatomy.blocks):
        x, y = given[block].double(), made[block].double()
        cosine = (x * y).sum(1) / (x.square().sum(1).sqrt() * y.square().sum(1).sqrt())
        assert found is not None
        assert float(found[index]) == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_sums_over_all_that_belongs_to_a_unit(importance: str, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    found = scores(model, importance, ROWS)
    whole: Any = load_model(model)
    if importance == "taylor":
        losses = []
        for row in ROWS:
            ids = row["input_ids"]
            told = whole(ids[None]).logits[0].log_softmax(-1)
            losses += [-told[t, ids[t + 1]] for t in range(len(ids) - 1)]
        torch.stack(losses).mean().backward()
        worth = {n: (p * p.grad).abs().double().detach() for n, p in whole.named_parameters()}
    else:
        named = whole.named_parameters()
        worth = {n: p.double().detach().square() * (p.dim() > 1) for n, p in named}
    for index, block in enumerate(model.anatomy.blocks):
        part = {n.removeprefix(f"{block}."): w for n, w in worth.items() if n.startswith(f"{block}.")}
        for j in range(40):
            gate, up = part["mlp.gate_proj.weight"][j], part["mlp.up_proj.weight"][j]
            neuron = gate.sum() + up.sum() + part["mlp.down_proj.weight"][:, j].sum()
            assert float(found.units["ffn"][index, j]) == pytest.approx(float(neuron), rel=1e-4)
        for g in range(2):
            queries, keys = slice(32 * g, 32 * g + 32), slice(16 * g, 16 * g + 16)
            group = (
                part["self_attn.q_proj.weight"][queries].sum() + part["self_attn.k_proj.weight"][keys].sum()
            )
            group += part["self_attn.v_proj.weight"][keys].sum()
            group += part["self_attn.o_proj.weight"][:, queries].sum()
            assert float(found.units["heads"][index, g]) == pytest.approx(float(group), rel=1e-4)
    writers = ("o_proj.weight", "down_proj.weight")
    for c in range(32):
        channel = sum(
            float(w[c].sum() if w.dim() == 1 or n.endswith(writers) else w[:, c].sum())
            for n, w in worth.items()
        )
        assert float(found.units["hidden"][c]) == pytest.approx(channel, rel=1e-4)


def test_a_block_is_worth_what_it_adds_times_the_gradient(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    found = scores(model, "taylor", ROWS).blocks_L
    whole: Any = load_model(model)
    want, tokens = torch.zeros(4, dtype=torch.float64), 0
    for row in ROWS:
        ids = row["input_ids"]
        for index in range(4):
            # A factor for each token on what the block adds: its gradient is the product asked for.
            factor_T = torch.ones(len(ids), requires_grad=True)

            def scale(_: nn.Module, args: Any, output: Tensor, factor_T: Tensor = factor_T) -> Tensor:
                return args[0] + factor_T[None, :, None] * (output - args[0])

            handle = whole.model.layers[index].register_forward_hook(scale)
            told = whole(ids[None]).logits[0].log_softmax(-1)
            loss = sum(-told[t, ids[t + 1]] for t in range(len(ids) - 1))
            (grad_T,) = torch.autograd.grad(loss, factor_T)
            want[index] += grad_T.double().abs().sum()
            handle.remove()
        tokens += len(ids) - 1
    assert found is not None
    torch.testing.assert_close(found, want / tokens, rtol=1e-4, atol=1e-9)


def test_fluctuation_is_the_variance_of_what_is_read_times_its_weights(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    found = scores(model, "fluctuation", ROWS)
    readers = [n for n, linear in model.anatomy.linears.items() if linear.block]
    whole, given, _ = watched(model, readers, ROWS)

    def worth(layer: str) -> Tensor:
        inputs: Any = given[layer].double()
        variance = ((inputs - inputs.mean(0)) ** 2).mean(0)
        weight: Any = whole.get_submodule(layer).weight
        return variance * (weight.double().detach() ** 2).sum(0)

    hidden = torch.zeros(32, dtype=torch.float64)
    for index, block in enumerate(model.anatomy.blocks):
        torch.testing.assert_close(
            found.units["ffn"][index], worth(f"{block}.mlp.down_proj"), rtol=1e-3, atol=1e-9
        )
        heads = worth(f"{block}.self_attn.o_proj").view(2, -1).sum(1)
        torch.testing.assert_close(found.units["heads"][index], heads, rtol=1e-3, atol=1e-9)
        for layer in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            hidden += worth(f"{block}.{layer}")
    torch.testing.assert_close(found.units["hidden"], hidden, rtol=1e-3, atol=1e-9)


def test_a_unit_that_is_nearly_a_constant_has_a_variance_all_the_same(tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", tmp_path / "model")
    changed: Any = load_model(model)
    with torch.no_grad():
        changed.transformer.h[3].mlp.c_fc.weight.mul_(1e-2)
        changed.transformer.h[3].mlp.c_fc.bias.fill_(100.0)
    changed.save_pretrained(tmp_path / "constant")
    model = open_model(tmp_path / "constant")
    found = scores(model, "fluctuation", ROWS).units["ffn"]
    layer = "transformer.h.3.mlp.c_proj"
    whole, given, _ = watched(model, [layer], ROWS)
    weight: Any = whole.get_submodule(layer).weight.detach()
    want = given[layer].double().var(0, correction=0) * weight.double().square().sum(1)
    assert float(want.min()) > 0
    torch.testing.assert_close(found[3], want, rtol=0.05, atol=0.0)


def test_the_forecast_of_taylor_counts_the_logits(tmp_path: Path) -> None:
    def forecast(vocabulary: int) -> tuple[int, int]:
        place = tmp_path / str(vocabulary)
        model = build("LlamaForCausalLM", place, vocab_size=vocabulary, max_position_embeddings=2048)
        options = {"ffn": 0.5, "importance": "taylor"}
        stage = Prune("cut", samples=1, context_length=2048, options=options)
        return stage.forecast(outlook(model)).memory_bytes, model.anatomy.num_parameters

    (large, parameters), (small, fewer) = forecast(8192), forecast(4096)
    more = large - small - 2 * 4 * (parameters - fewer)  # the weights and their gradients
    logits = 4 * 2048 * 4096
    assert more >= 4 * logits, "in float32, their log-softmax, and the gradients of both"


def test_what_is_worth_most_stays(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    surgery = planned(model, layers=2, ffn=8, heads=2, hidden=16)
    chance = torch.Generator().manual_seed(3)
    worth = {
        "ffn": torch.rand(4, 40, generator=chance, dtype=torch.float64),
        "heads": torch.rand(4, 2, generator=chance, dtype=torch.float64),
        "hidden": torch.rand(32, generator=chance, dtype=torch.float64),
    }
    blocks_L = torch.tensor([0.1, 0.7, 0.5, 0.3], dtype=torch.float64)
    kept = choose(surgery, Scores(blocks_L=blocks_L, units=worth), 4)
    assert kept.blocks == (1, 2)
    assert choose(surgery, Scores(units=worth), 4).blocks == (0, 3)
    for kind, count in (("ffn", 8), ("heads", 1), ("hidden", 16)):
        for keep, value in zip(
            kept.units[kind].view(-1, worth[kind].shape[-1]),
            worth[kind].view(-1, worth[kind].shape[-1]),
            strict=True,
        ):
            assert int(keep.sum()) == count
            assert float(value[keep].min()) > float(value[~keep].max())


def test_the_blocks_that_stay_are_those_worth_most(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path / "model", num_hidden_layers=5)
    kept = kept_by(model, ROWS, layers=2, importance="activation").blocks
    worth = IMPORTANCES["activation"]().measure(Subject(model=model, dimensions=None, rows=ROWS)).blocks_L
    assert worth is not None
    assert list(kept) == sorted(worth.argsort(descending=True)[:2].tolist())


def test_padding_is_not_learnt_by_taylor(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    short = [{"input_ids": PADDED[0]["input_ids"][:9]}]
    padded, plain = scores(model, "taylor", PADDED), scores(model, "taylor", short)
    assert padded.num_tokens == plain.num_tokens == 8
    torch.testing.assert_close(padded.units["ffn"], plain.units["ffn"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("importance", ["activation", "fluctuation", "taylor"])
def test_no_text_is_no_importance(importance: str, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tmp_path)
    with pytest.raises(DataError, match="expected tokens"):
        scores(model, importance, [])


@pytest.mark.parametrize("importance", ["activation", "fluctuation", "taylor"])
def test_a_stage_reads_its_data(importance: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a model, and it was too large.\n" * 40)
    model = open_model(tiny_llama(tmp_path / "model", num_hidden_layers=3))
    options = {"layers": 2, "ffn": 0.5, "hidden": 0.5, "importance": importance}
    stage = Prune("cut", samples=4, context_length=32, options=options)
    assert stage.faults(outlook(model), "stages[0]") == []
    (tmp_path / "out").mkdir()
    context = StageContext(
        out=tmp_path / "out",
        scratch=tmp_path / "scratch",
        original=model.directory,
        data=DataSpec(source=str(tmp_path / "text.txt")),
        cache=tmp_path / "cache",
        device="cpu",
    )
    result = stage.run(model, context)
    assert result.metrics["calibration_tokens"] in (4 * 32, 4 * 31)
    after = open_model(tmp_path / "out")
    assert after.anatomy.num_parameters == result.metrics["parameters_kept"]
    assert after.anatomy.num_parameters == stage.forecast(outlook(model)).after.anatomy.num_parameters


def test_magnitude_says_that_it_leaves_data_unread(tmp_path: Path) -> None:
    model = open_model(tiny_llama(tmp_path / "model"))
    (tmp_path / "out").mkdir()
    context = StageContext(
        out=tmp_path / "out",
        scratch=tmp_path,
        original=model.directory,
        data=DataSpec(source="absent"),
        cache=tmp_path,
    )
    result = Prune("cut", data=DataSpec(source="x.txt"), options={"ffn": 0.5}).run(model, context)
    assert result.warnings == ("magnitude reads no data; the data given to it was left unread.",)


def test_faults_of_importances(tmp_path: Path) -> None:
    model = outlook(build("BertForMaskedLM", tmp_path))

    def said(**options: Any) -> str:
        return "\n".join(map(str, Prune("cut", options=options).faults(model, "s")))

    assert (
        "s.importance: expected the name of an importance, got 'activations'. Did you mean: activation"
        in said(ffn=0.5, importance="activations")
    )
    assert "this model does not predict the next token" in said(ffn=0.5, importance="taylor")
    assert said(ffn=0.5, importance="activation") == ""
    long = Prune("cut", context_length=512, options={"ffn": 0.5, "importance": "activation"})
    assert "s.context_length: expected at most 64" in str(long.faults(model, "s")[0])
    with pytest.raises(UnknownMethodError, match="Did you mean: taylor"):
        IMPORTANCES["tailor"]
