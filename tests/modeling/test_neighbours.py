"""Groups that may hand each other factors: what is found, what is not, and that folding changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from compresskit.calibration.relay import Relay
from compresskit.modeling import StreamedModel, load_model, open_model
from compresskit.modeling.neighbours import PROBE_TOKENS, Group, find_groups, fold
from tests.modeling.conftest import Model
from tests.modeling.families import FAMILIES, tokens

Readers = dict[str, tuple[str, ...]]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = {"input_layernorm": QKV, "self_attn.v_proj": ("self_attn.o_proj",)}
GATED = {"mlp.up_proj": ("mlp.down_proj",)}
LLAMA = ATTENTION | {"post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")} | GATED
GEMMA = ATTENTION | {"pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj")} | GATED
# The last third of c_attn's channels are the values; between c_fc and c_proj stands GELU.
GPT2: Readers = {"ln_1": ("attn.c_attn",), "attn.c_attn": ("attn.c_proj",), "ln_2": ("mlp.c_fc",)}
EXPECTED: dict[str, Readers] = {
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gpt2": GPT2,
    "gpt2-bare": GPT2,
    "opt": {
        "self_attn_layer_norm": QKV,
        "self_attn.v_proj": ("self_attn.out_proj",),
        "final_layer_norm": ("fc1",),
        "fc1": ("fc2",),
    },
    "bert": {"attention.self.value": ("attention.output.dense",)},  # its norms feed the residual stream
}
TWO_HEADS_OF_FOUR_READ_ONE = [*range(4), *range(4), *range(4, 8), *range(4, 8)]


def groups_of(streamed: StreamedModel, relay: Relay, index: int) -> tuple[Group, ...]:
    """All groups of block ``index``, which is entered."""
    row = {"input_ids": tokens(PROBE_TOKENS, 0)[None]}
    if index == 0:
        relay.learn(row)
    name = streamed.blocks[index]
    linears = streamed.source.anatomy.linears
    layers = [n.removeprefix(f"{name}.") for n in linears if linears[n].block == name]
    hidden = torch.randn(1, PROBE_TOKENS, 16, generator=torch.Generator().manual_seed(index))
    call = relay.call(index, row, hidden.to(streamed.dtype))
    return find_groups(streamed.module.get_submodule(name), layers, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_groups_are_found_and_folding_changes_nothing(
    family: str, dtype: torch.dtype, model: Model, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(3)
    with StreamedModel(open_model(model(family, dtype)), tmp_path) as streamed:
        relay = Relay(streamed)
        for index, block in enumerate(streamed.blocks):
            with streamed.block(index):
                groups = groups_of(streamed, relay, index)
                assert {g.producer: g.consumers for g in groups} == EXPECTED[family]
                for group in groups:
                    is_norm = "norm" in group.producer or "ln_" in group.producer
                    assert group.offset == (float("gemma" in family) if is_norm else None)
                    grouped = "self_attn.o_proj" in group.consumers
                    first = group.num_channels - len(group.channel_I)
                    plain = list(range(first, group.num_channels))
                    assert first == (32 if group.producer == "attn.c_attn" else -8 if grouped else 0)
                    assert group.channel_I.tolist() == (TWO_HEADS_OF_FOUR_READ_ONE if grouped else plain)
                    scale_C = torch.ones(group.num_channels)
                    scale_C[group.channel_I] = torch.rand(len(group.channel_I), generator=generator) * 3 + 0.3
                    made_I = fold(
                        group,
                        scale_C,
                        lambda n, b=block: streamed.parameter(f"{b}.{n}"),  # type: ignore[misc]
                        lambda n, v, b=block: streamed.set_parameter(f"{b}.{n}", v),  # type: ignore[misc]
                    )
                    torch.testing.assert_close(made_I, scale_C[group.channel_I], rtol=0.05, atol=0)
    before, after = open_model(model(family, dtype)), open_model(tmp_path)
    changed = {n for n in before.names() if not torch.equal(before.tensor(n), after.tensor(n))}
    parts = {part for producer, readers in EXPECTED[family].items() for part in (producer, *readers)}
    assert {n.rpartition(".")[0] for n in changed} == {
        f"{b}.{p}" for b in before.anatomy.blocks for p in parts
    }
    ids = tokens(20, 5)[None]
    logits = [load_model(source, dtype="float32")(ids).logits for source in (before, after)]
    tolerance = 2e-5 if dtype == torch.float32 else 0.1  # every weight was rounded once more
    assert (logits[1] - logits[0]).norm() <= tolerance * logits[0].norm()


def test_a_norm_that_rounds_hands_on_the_scale_it_got() -> None:
    """Near -1 a bfloat16 weight of (1 + weight) is coarse; the consumers follow what it became."""
    group = Group("norm", ("reader",), torch.arange(4), 4, 1.0, False, frozenset())
    held = {
        "norm.weight": torch.tensor([-0.9, -0.5, 0.0, -1.0], dtype=torch.bfloat16),
        "reader.weight": torch.ones(2, 4),
    }
    before_C = 1 + held["norm.weight"].float()
    scale_I = fold(group, torch.tensor([7.0, 60.0, 1e6, 3.0]), held.__getitem__, held.__setitem__)
    after_C = 1 + held["norm.weight"].float()
    assert abs(scale_I[1] / 60 - 1) > 0.02, "not the scale asked for"
    torch.testing.assert_close(after_C * held["reader.weight"][0], before_C)
    assert scale_I[2:].tolist() == [1.0, 1.0], "a weight that became 0, or was, carries no scale"


class Toy(nn.Module):
    """A norm, two layers and what stands between them; ``extra`` reads the norm or the first layer too."""

    def __init__(self, between: nn.Module, extra: str = "", width: int = 8) -> None:
        super().__init__()
        self.norm, self.between, self.extra = nn.LayerNorm(width), between, extra
        self.first, self.second = nn.Linear(width, 12), nn.Linear(12, width)
        self.router = nn.Parameter(torch.randn(width))

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        inner = self.between(self.first(normed))
        out: Tensor = self.second(inner)
        if self.extra == "router":
            out = out * (normed * self.router).sum(-1, keepdim=True).sigmoid()
        if self.extra == "tap":
            out = out + inner.mean(-1, keepdim=True)
        return out + (normed if self.extra == "residual" else hidden)


def toy_groups(toy: Toy, layers: tuple[str, ...] = ("first", "second")) -> dict[str, Any]:
    found = find_groups(toy, layers, ((torch.randn(1, PROBE_TOKENS, 8),), {}))
    return {group.producer: group.consumers for group in found}


NORM, FIRST = {"norm": ("first",)}, {"first": ("second",)}


@pytest.mark.parametrize(
    ("toy", "expected"),
    [
        (Toy(nn.ReLU()), NORM | FIRST),
        (Toy(nn.LeakyReLU()), NORM | FIRST),
        (Toy(nn.Identity()), NORM | FIRST),
        (Toy(nn.GELU()), NORM),
        (Toy(nn.Softplus()), NORM),
        (Toy(nn.ReLU(), "router"), FIRST),
        (Toy(nn.ReLU(), "residual"), FIRST),
        (Toy(nn.ReLU(), "tap"), NORM),
        (Toy(nn.LayerNorm(12, elementwise_affine=False)), NORM),
        (Toy(nn.LayerNorm(12)), NORM | {"between": ("second",)}),
    ],
)
def test_anything_else_that_reads_the_channels_breaks_the_group(toy: Toy, expected: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    assert toy_groups(toy) == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.state_dict().items())


def test_values_and_what_is_gated_are_the_last_a_fused_layer_makes() -> None:
    """Phi-3 makes queries, keys and values at once, and the gate with what it gates; values are fewer."""
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        vocab_size=64,
    )
    block = Phi3DecoderLayer(config, 0).eval()
    hidden = torch.randn(1, PROBE_TOKENS, 32)
    angle = torch.arange(PROBE_TOKENS)[None, :, None] / torch.arange(1, 9)
    call = ((hidden,), {"position_embeddings": (angle.cos(), angle.sin()), "attention_mask": None})
    layers = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    groups = {group.producer: group for group in find_groups(block, layers, call)}
    assert groups["self_attn.qkv_proj"].consumers == ("self_attn.o_proj",)
    assert groups["self_attn.qkv_proj"].channel_I.tolist() == [
        48 + c for c in (*range(8), *range(8), *range(8, 16), *range(8, 16))
    ]
    assert groups["mlp.gate_up_proj"].consumers == ("mlp.down_proj",)
    assert groups["mlp.gate_up_proj"].channel_I.tolist() == list(range(48, 96))
    assert len(groups) == 4


def test_only_layers_that_may_change_are_in_a_group() -> None:
    assert toy_groups(Toy(nn.ReLU()), ("first",)) == NORM
    assert toy_groups(Toy(nn.ReLU()), ("second",)) == {}
    assert toy_groups(Toy(nn.ReLU()), ()) == {}


def test_thousands_of_channels_behind_a_relu_are_all_seen() -> None:
    toy = Toy(nn.ReLU())
    toy.first, toy.second = nn.Linear(8, 4096), nn.Linear(4096, 8)
    for seed in range(3):
        hidden = torch.randn(1, PROBE_TOKENS, 8, generator=torch.Generator().manual_seed(seed))
        assert len(find_groups(toy, ("first", "second"), ((hidden,), {}))) == 2


def test_channels_are_told_apart_where_there_are_thousands() -> None:
    class Shuffled(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden[..., torch.randperm(4096, generator=torch.Generator().manual_seed(9))]

    toy = Toy(Shuffled())
    toy.first, toy.second = nn.Linear(8, 4096), nn.Linear(4096, 8)
    group = find_groups(toy, ("first", "second"), ((torch.randn(1, PROBE_TOKENS, 8),), {}))[1]
    assert torch.equal(group.channel_I, torch.randperm(4096, generator=torch.Generator().manual_seed(9)))
