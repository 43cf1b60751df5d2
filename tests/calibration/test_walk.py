"""The walk against the slow way: the whole model in memory, hooks on it, one step changed after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaModel,
    LlamaRotaryEmbedding,
)

from compresskit.calibration.rows import Batches
from compresskit.calibration.statistics import STATISTICS, LayerStats
from compresskit.calibration.walk import Walked, walk
from compresskit.errors import DataError, InputError, ModelError, StatisticError
from compresskit.modeling import Anatomy, StreamedModel, load_model, open_model
from tests.modeling.conftest import Model
from tests.modeling.families import CAUSAL, FAMILIES, make, tokens

EVERY = frozenset(STATISTICS)
# Layers that read one tensor, in order of execution, by the ends of their names.
LLAMA = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
STEPS = {
    "gpt2": (("c_attn",), ("attn.c_proj",), ("c_fc",), ("mlp.c_proj",)),
    "opt": (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)),
    "bert": (
        ("query", "key", "value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
}
# Where attention returns its weights too, nothing can stand in for it.
EAGER = (("",),)
Row = Mapping[str, Tensor]


def weight_of(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
    """A method whose result depends smoothly on what it is told, so that any wrong statistic shows."""
    sq_mean_I = stats.require_input_sq_mean(weight_OI.shape[1])
    return weight_OI * (1 - 0.5 * sq_mean_I / (1 + sq_mean_I)) + 0.01


def some_rows(*lengths: int) -> list[Row]:
    return [{"input_ids": tokens(n, seed)} for seed, n in enumerate(lengths)]


def packed(*lengths: int) -> Row:
    ids = torch.cat([row["input_ids"] for row in some_rows(*lengths)])
    return {"input_ids": ids, "position_ids": torch.cat([torch.arange(n) for n in lengths])}


def inputs_of(model: Any, names: Sequence[str], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Every input (T, I) of the modules ``names`` over all ``rows``; padding left out."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    keep = torch.ones(0)

    def hook_of(name: str) -> Any:
        return lambda module, args: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1])[keep])

    handles = [model.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in names]
    for row in rows:
        keep = row.get("attention_mask", torch.ones_like(row["input_ids"])).bool()
        with torch.no_grad():
            model(**{k: v[None] for k, v in row.items()}, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def stats_of(x_TI: Tensor) -> LayerStats:
    x = x_TI.double()
    return LayerStats(
        num_tokens=len(x),
        input_mean_I=x.mean(0).float(),
        input_sq_mean_I=x.square().mean(0).float(),
        input_abs_mean_I=x.abs().mean(0).float(),
        input_abs_max_I=x.abs().amax(0).float(),
        input_gram_II=(x.t() @ x / len(x)).float(),
    )


def steps_of(block: str, family: str, layers: Sequence[str], *, is_eager: bool) -> list[list[str]]:
    """Those of ``layers`` in ``block``, step by step."""
    here = [name for name in layers if name.startswith(f"{block}.")]
    steps = []
    for ends in EAGER if is_eager else STEPS.get(family.removesuffix("-bare"), LLAMA):
        steps.append([name for name in here if name.endswith(ends)])
        here = [name for name in here if name not in steps[-1]]
    assert not here
    return steps


def slow_walk(
    model: Any,
    anatomy: Anatomy,
    rows: Sequence[Row],
    layers: Sequence[str],
    family: str,
    *,
    in_turn: bool = True,
) -> tuple[dict[str, LayerStats], dict[str, float]]:
    """Change ``layers`` of ``model`` step by step, each with statistics of the model as changed so far."""
    all_stats: dict[str, LayerStats] = {}
    errors: dict[str, float] = {}
    outside = [n for n in layers if anatomy.linears[n].block is None]
    front = [n for n in outside if "project_in" in n]
    is_eager = not in_turn or model.config._attn_implementation == "eager"
    steps = [front]
    for block in anatomy.blocks:
        steps += steps_of(block, family, layers, is_eager=is_eager)
    for here in [*steps, [n for n in outside if n not in front]]:
        inputs = inputs_of(model, here, rows)
        stats = {name: stats_of(x) for name, x in inputs.items()}
        for name in here:
            weight = model.get_submodule(name).weight.data
            weight_OI = weight.t() if anatomy.linears[name].transposed else weight
            new_OI = weight_of(name, weight_OI, stats[name])
            old_TO, new_TO = inputs[name] @ weight_OI.t(), inputs[name] @ new_OI.t()
            errors[name] = ((new_TO - old_TO).square().sum() / old_TO.square().sum()).item()
            weight_OI.copy_(new_OI)
        all_stats |= stats
    return all_stats, errors


def check_against_the_slow_way(
    family: str,
    directory: Path,
    out: Path,
    rows: Sequence[Row],
    layers: Sequence[str] | None = None,
    **options: Any,
) -> Walked:
    source = open_model(directory)
    chosen = [n for n, linear in source.anatomy.linears.items() if linear.block] if layers is None else layers
    got: dict[str, LayerStats] = {}

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        got[layer] = stats
        return weight_of(layer, weight_OI, stats)

    out.mkdir()
    with StreamedModel(source, out) as streamed:
        walked = walk(streamed, rows, visit, EVERY, layers=layers, **options)
    reference = load_model(source)
    in_turn = options.get("true_sequential", True)
    stats, errors = slow_walk(reference, source.anatomy, rows, chosen, family, in_turn=in_turn)
    assert list(walked.relative_error) == [n for n in source.anatomy.linears if n in chosen]
    for name in chosen:
        assert got[name].num_tokens == stats[name].num_tokens == walked.num_tokens
        for need, field in STATISTICS.items():
            value = got[name].require(need, source.anatomy.linears[name].in_features)
            torch.testing.assert_close(
                value, getattr(stats[name], field), rtol=2e-4, atol=1e-5, msg=f"{name} {need}"
            )
        assert walked.relative_error[name] == pytest.approx(errors[name], rel=1e-3), name
    after = load_model(out)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter, rtol=1e-4, atol=1e-5, msg=name)
    return walked


@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_sees_the_changed_ones_before_it(family: str, model: Model, tmp_path: Path) -> None:
    check_against_the_slow_way(family, model(family), tmp_path / "out", some_rows(20, 7, 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_whole_block_may_be_measured_before_it_is_changed(
    family: str, model: Model, tmp_path: Path
) -> None:
    walked = check_against_the_slow_way(
        family, model(family), tmp_path / "out", some_rows(20, 7, 1), true_sequential=False
    )
    assert walked.warnings == ()


def test_a_visit_may_leave_weights_alone_and_a_walk_write_nothing(model: Model, tmp_path: Path) -> None:
    source = open_model(model("llama"))
    seen: dict[str, int] = {}

    def look(layer: str, weight_OI: Tensor, stats: LayerStats) -> None:
        seen[layer] = stats.num_tokens

    (tmp_path / "out").mkdir()
    for out in (None, tmp_path / "out"):
        with StreamedModel(source, out) as streamed:
            walked = walk(streamed, some_rows(20, 7), look, EVERY)
        assert set(walked.relative_error.values()) == {None}
    inside = [name for name, linear in source.anatomy.linears.items() if linear.block]
    assert seen == dict.fromkeys(inside, 27)
    written = open_model(tmp_path / "out")
    assert all(torch.equal(written.tensor(name), source.tensor(name)) for name in source.names())


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_never_meet(family: str, model: Model, tmp_path: Path) -> None:
    """A packed row gives what its documents give one by one, in models too that attend across them."""
    source = open_model(model(family))
    rows = {"packed": [packed(9, 12, 3), packed(4)], "apart": some_rows(9, 12, 3) + some_rows(4)}
    walked = {}
    for name in rows:
        (tmp_path / name).mkdir()
        with StreamedModel(source, tmp_path / name) as streamed:
            walked[name] = walk(streamed, rows[name], weight_of, EVERY)
    assert walked["packed"] == walked["apart"]
    assert walked["packed"].num_tokens == 28
    one, other = open_model(tmp_path / "packed"), open_model(tmp_path / "apart")
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in source.names())


@pytest.mark.parametrize("family", [name for name in CAUSAL if name != "opt"])
def test_transformers_agrees_on_packed_rows(family: str, model: Model, tmp_path: Path) -> None:
    """The whole model, run on the packed row with its positions, keeps documents apart as well."""
    check_against_the_slow_way(family, model(family), tmp_path / "out", [packed(9, 12, 3)])


def test_positions_that_run_on_make_one_document(model: Model, tmp_path: Path) -> None:
    row = packed(9, 12) | {"position_ids": torch.arange(21)}
    check_against_the_slow_way("gpt2", model("gpt2"), tmp_path / "out", [row])
    shifted = packed(9) | {"position_ids": torch.arange(5, 14)}
    check_against_the_slow_way("gpt2", model("gpt2"), tmp_path / "shifted", [shifted])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_count(family: str, model: Model, tmp_path: Path) -> None:
    rows = []
    for row, pad in zip(some_rows(11, 6), (0, 5), strict=True):
        ids, ones = row["input_ids"], torch.ones(len(row["input_ids"]), dtype=torch.long)
        mask = torch.nn.functional.pad(ones, (0, pad))
        rows.append({"input_ids": torch.nn.functional.pad(ids, (0, pad)), "attention_mask": mask})
    walked = check_against_the_slow_way(family, model(family), tmp_path / "out", rows)
    assert walked.num_tokens == 17
    (tmp_path / "bare").mkdir()
    with StreamedModel(open_model(model(family)), tmp_path / "bare") as streamed:
        walk(streamed, some_rows(11, 6), weight_of, EVERY)
    one, other = open_model(tmp_path / "out"), open_model(tmp_path / "bare")
    for name in one.names():
        torch.testing.assert_close(one.tensor(name), other.tensor(name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", ["lm_head"]),
        ("llama", ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"]),
        ("opt", ["model.decoder.project_in", "model.decoder.project_out", "model.decoder.layers.2.fc1"]),
        ("bert", ["cls.predictions.transform.dense"]),
    ],
)
def test_layers_outside_the_blocks(family: str, layers: list[str], model: Model, tmp_path: Path) -> None:
    check_against_the_slow_way(family, model(family), tmp_path / "out", some_rows(20, 7), layers=layers)


def test_hidden_states_may_live_in_a_file(model: Model, tmp_path: Path) -> None:
    spill = tmp_path / "scratch" / "hidden"
    check_against_the_slow_way("gemma3", model("gemma3"), tmp_path / "out", some_rows(20, 7, 1), spill=spill)
    assert list(spill.parent.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_visit_that_changes_nothing_changes_nothing(dtype: str, model: Model, tmp_path: Path) -> None:
    source = open_model(model("mistral"))
    (tmp_path / "out").mkdir()
    with StreamedModel(source, tmp_path / "out", dtype=dtype) as streamed:
        walked = walk(streamed, some_rows(8), lambda name, weight_OI, stats: weight_OI, EVERY)
    assert set(walked.relative_error.values()) == {0.0}
    after = open_model(tmp_path / "out")
    assert all(torch.equal(source.tensor(n), after.tensor(n)) for n in source.names())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_only_one_block_is_in_memory(family: str, model: Model, tmp_path: Path) -> None:
    source = open_model(model(family))
    (tmp_path / "out").mkdir()
    with StreamedModel(source, tmp_path / "out") as streamed:
        outside = streamed.resident_bytes
        largest = max(
            sum(source.place(n).num_bytes for n in source.names() if source.anatomy.block_of(n) == block)
            for block in streamed.blocks
        )
        held = []

        def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
            loaded = {
                source.anatomy.block_of(n) for n, p in streamed.module.named_parameters() if not p.is_meta
            }
            assert loaded == {None, source.anatomy.linears[layer].block}
            assert all(streamed.module.get_parameter(f"{name}.weight").is_meta for name in streamed.tables)
            held.append(streamed.resident_bytes)
            return weight_OI * 2

        walk(streamed, some_rows(8), visit, frozenset({"input_gram"}))
        assert max(held) == outside + largest
        assert streamed.resident_bytes == outside


def test_without_data_every_layer_is_visited_once(model: Model, tmp_path: Path) -> None:
    source = open_model(model("opt"))
    (tmp_path / "out").mkdir()
    chosen = [n for n in source.anatomy.linears if n != "lm_head"]
    visited = []

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        assert stats.num_tokens == 0
        visited.append(layer)
        return weight_OI * 2

    with StreamedModel(source, tmp_path / "out") as streamed:
        walked = walk(streamed, None, visit, layers=chosen)
    assert sorted(visited) == sorted(chosen)
    assert walked == Walked(dict.fromkeys(chosen), 0)
    after = open_model(tmp_path / "out")
    for name in source.names():
        factor = 2 if name.removesuffix(".weight") in chosen else 1
        assert torch.equal(after.tensor(name), source.tensor(name) * factor)


def test_without_needs_only_the_error_is_measured(model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with StreamedModel(open_model(model("llama")), tmp_path / "out") as streamed:
        walked = walk(streamed, some_rows(8), lambda n, weight_OI, s: weight_OI * 1.5)
    assert all(error == pytest.approx(0.25, rel=1e-4) for error in walked.relative_error.values())


def test_two_walks_write_the_same_bytes(model: Model, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with StreamedModel(open_model(model("qwen3")), tmp_path / name) as streamed:
            walk(streamed, some_rows(20, 7), weight_of, EVERY)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_blocks_that_pass_on_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    """T5's first block computes the position bias that all others are given."""
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4)
    config.is_encoder_decoder = False
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "out").mkdir()
    streamed = StreamedModel(open_model(tmp_path / "t5"), tmp_path / "out")
    with pytest.raises(ModelError, match="cannot run one by one"):
        walk(streamed, some_rows(8), weight_of, EVERY)


def test_a_block_may_be_prepared_between_measuring_and_visiting(model: Model, tmp_path: Path) -> None:
    """Prepared blocks are what visits see, what the error is relative to, and what is written."""
    source = open_model(model("llama"))
    (tmp_path / "out").mkdir()
    calls: list[tuple[int, list[str]]] = []

    def prepare(
        index: int, streamed: StreamedModel, stats: Mapping[str, LayerStats]
    ) -> Mapping[str, LayerStats]:
        calls.append((index, list(stats)))
        for name in stats:
            assert stats[name].input_sq_mean_I is not None
            streamed.set_weight(name, streamed.weight_OI(name) / 2)
        norm = f"{streamed.blocks[index]}.input_layernorm.weight"
        streamed.set_parameter(norm, streamed.parameter(norm) * 2)
        half_I = torch.full((16,), 0.5)
        return {name: replace(one.divided_by(half_I), num_tokens=7) for name, one in stats.items()}

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        assert stats.num_tokens == 7
        assert torch.equal(weight_OI, source.weight_OI(layer) / 2)
        return weight_OI

    layers = [f"model.layers.1.self_attn.{name}_proj" for name in "qk"]
    with StreamedModel(source, tmp_path / "out") as streamed:
        walked = walk(
            streamed, some_rows(8), visit, frozenset({"input_sq_mean"}), layers=layers, prepare=prepare
        )
    assert calls == [(0, []), (1, layers)]
    assert set(walked.relative_error.values()) == {0.0}, "of the prepared weights, not of those before"
    after = open_model(tmp_path / "out")
    for name in source.names():
        halved = name.removesuffix(".weight") in layers
        doubled = name in [f"model.layers.{index}.input_layernorm.weight" for index in (0, 1)]
        factor = 0.5 if halved else 2 if doubled else 1
        assert torch.equal(after.tensor(name), source.tensor(name) * factor), name


def test_faults_of_the_request_are_told(model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    streamed = StreamedModel(open_model(model("llama-tied")), tmp_path / "out")
    with pytest.raises(DataError, match="Give more calibration data"):
        walk(streamed, [], weight_of, EVERY)
    blank = {"input_ids": tokens(3, 0), "attention_mask": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(DataError, match="padding only"):
        walk(streamed, [blank], weight_of, EVERY)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.up_proj"):
        walk(streamed, some_rows(3), weight_of, EVERY, layers=["model.layers.0.mlp.up_prj"])
    with pytest.raises(ModelError, match="Add lm_head to ignore"):
        walk(streamed, some_rows(3), weight_of, EVERY, layers=["lm_head"])


def test_each_layer_runs_once_in_all_steps(model: Model, tmp_path: Path) -> None:
    """Steps are looked for in the first block alone; nothing needs the very last product."""
    (tmp_path / "out").mkdir()
    source = open_model(model("llama"))
    runs: dict[str, int] = {}
    with StreamedModel(source, tmp_path / "out") as streamed:
        for name in source.anatomy.linears:
            count = lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1})  # noqa: E731
            streamed.module.get_submodule(name).register_forward_hook(count)
        walk(streamed, some_rows(8, 7, 6), weight_of, EVERY)
    for name, linear in source.anatomy.linears.items():
        if linear.block in ("model.layers.1", "model.layers.2"):
            # In the first batch all layers of a step are watched, up to the last.
            again = name.endswith(("q_proj", "k_proj", "gate_proj"))
            assert runs.get(name, 0) == (0 if name == "model.layers.2.mlp.down_proj" else 3) + again, name
    assert "lm_head" not in runs


@pytest.mark.parametrize("between", [[], [7]])
def test_masks_that_depend_on_the_tokens_are_made_for_each_batch(
    between: list[int], model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of one shape, one of which has tokens that the model itself masks."""
    forward = LlamaModel.forward

    def masking(self: Any, input_ids: Tensor, attention_mask: Any = None, **more: Any) -> Any:
        mask = (input_ids != 5).long() if attention_mask is None else attention_mask
        return forward(self, input_ids=input_ids, attention_mask=mask, **more)

    monkeypatch.setattr(LlamaModel, "forward", masking)
    monkeypatch.setattr(Batches.__init__, "__defaults__", (8,))
    rows = [{"input_ids": torch.tensor([1, 2, 3, 4, 6, 7, 8, 9])}]
    rows += [{"input_ids": torch.tensor([1, 2, 3, 4, 6, 7, 8])} for _ in between]
    rows.append({"input_ids": torch.tensor([1, 5, 5, 4, 5, 7, 8, 9])})
    check_against_the_slow_way("llama", model("llama"), tmp_path / "out", rows)


def test_blocks_that_are_given_more_of_the_embeddings_are_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaRotaryEmbedding.forward

    def shifted(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        return tuple(part + x.mean() for part in forward(self, x, position_ids))

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", shifted)
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(
            ModelError, match=r"model\.layers\.0: expected blocks that are given hidden states only"
        ),
        StreamedModel(open_model(model("llama")), tmp_path / "out") as streamed,
    ):
        walk(streamed, some_rows(8), weight_of, EVERY)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blocks_measured_in_one_step_are_named(attention: str, model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with StreamedModel(open_model(model("llama")), tmp_path / "out") as streamed:
        streamed.module.set_attn_implementation(attention)
        warnings = walk(streamed, some_rows(8), weight_of, EVERY).warnings
    if attention == "sdpa":
        assert warnings == ()
        return
    (said,) = warnings
    assert said.startswith("3 blocks, model.layers.0 the first, were measured before any of their layers")


def test_modules_that_leave_something_behind_are_measured_in_one_step(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, project = LlamaAttention.forward, LlamaMLP.forward
    left: list[Tensor] = []

    def leave(self: Any, hidden_states: Tensor, *args: Any, **more: Any) -> Any:
        left[:] = [hidden_states.mean(-1, keepdim=True)]
        return attend(self, hidden_states, *args, **more)

    monkeypatch.setattr(LlamaAttention, "forward", leave)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: project(self, x) * left[0])
    (tmp_path / "out").mkdir()
    with StreamedModel(open_model(model("llama")), tmp_path / "out") as streamed:
        (said,) = walk(streamed, some_rows(8, 8), weight_of, EVERY).warnings
    assert "more than what they return" in said


def test_progress_ends_at_its_total(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with StreamedModel(open_model(model("llama")), tmp_path / "out") as streamed:
        walk(streamed, some_rows(8, 8, 8, 7, 3), weight_of, EVERY)
    total = 5 * (1 + 3 + 2)  # the embedding, and each block twice but the last
    assert f"Calibrating {total}/{total} rows" in capsys.readouterr().err


def test_activations_that_overflow_are_told_by_layer(model: Model, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    def visit(layer: str, weight_OI: Tensor, stats: LayerStats) -> Tensor:
        stats.require("input_gram", weight_OI.shape[1])
        return weight_OI * (1e30 if "0.mlp" in layer else 1)

    with (
        pytest.raises(StatisticError, match=r"model\.layers\.0\.mlp\.down_proj: input_gram.*finite"),
        StreamedModel(open_model(model("llama")), tmp_path / "out") as streamed,
    ):
        walk(streamed, some_rows(8), visit, frozenset({"input_gram"}))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_layer_that_saw_no_token_is_told(tmp_path: Path) -> None:
    """A block's layer that the model never runs: the method's own demand names it and the cure."""
    source = open_model(make("llama", tmp_path / "in"))
    (tmp_path / "out").mkdir()
    idle = "model.layers.1.mlp.up_proj"
    with StreamedModel(source, tmp_path / "out") as streamed:
        mlp: Any = streamed.module.get_submodule("model.layers.1.mlp")
        mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)))
        with pytest.raises(StatisticError, match=rf"{idle}.*no calibration tokens.*add the layer to ignore"):
            walk(streamed, some_rows(8), weight_of, EVERY)
