"""Which entries of a block's linear layers belong together, and can only go together. No list of names.

What a linear layer (the reader: ``down``, ``fc2``, ``o_proj``) reads is differentiated with respect to what
the layers just before it (the makers) give, in a model of one block of the real widths. Its inputs fall into
equal runs, the units, as many as possible such that each output of each maker is felt by one run alone: a
neuron of a feed-forward network is one input, a key/value head with all query heads that share it is the run
of these heads' outputs. Norms mix neurons and attention mixes tokens, so all three are told apart.

No layer's weight takes part: in the probe each linear layer gives random numbers instead of a product, which
cuts the model into pieces and needs no memory for their weights. Of a large parameter with more axes, such as
that of all experts, there is one part along the first axis: all experts are one and the same.

Shapes: M = tokens of all sequences, N = inputs of a reader, F = outputs of a maker, U = units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.forwards import computing
from compresskit.modeling.skeleton import model_class
from compresskit.modeling.streaming import assign, fill_buffers
from compresskit.sparse.structured.resize import resized, with_blocks

VOCABULARY = 64
SEQUENCES = 16  # so many that no ReLU is closed in all of them
TOKENS = 7
LARGE = 1 << 22
"""Entries of a parameter that gets memory of its own in a probe."""
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """The units that one layer of each block reads; names are relative to the block.

    Attributes:
        reader: the layer that reads them; unit u is its inputs ``u * size`` to ``(u + 1) * size``.
        makers: the layers that make them, and the unit (F,) that each of their outputs belongs to.
        units: U.
        size: N / U.
    """

    reader: str
    makers: Mapping[str, Tensor]
    units: int
    size: int

    @property
    def owner_N(self) -> Tensor:
        """The unit of each input of the reader, (N,)."""
        return torch.arange(self.units).repeat_interleave(self.size)


@dataclass(frozen=True, slots=True)
class Couplings:
    """What the blocks of a model have; usually one of each.

    Attributes:
        ffn: neurons, each read at the token it was made at.
        heads: groups of attention heads: a key/value head and the query heads that share it.
    """

    ffn: tuple[Coupling, ...]
    heads: tuple[Coupling, ...]


def find_couplings(
    config: Any, anatomy: Anatomy, directory: Path, *, trust_remote_code: bool = False
) -> Couplings:
    """The couplings that every block of a model has.

    Args:
        config: of the model; not changed.
        anatomy: of the model.
        directory: where code of the model's own would lie.
        trust_remote_code: whether that code may run.

    Returns:
        None of a kind where its units cannot be told apart.

    Raises:
        ModelError: the blocks differ, or a block of it cannot be run by itself.
    """
    kinds = kinds_of_block(anatomy)
    if kinds != 1:
        cure = "Cut layers only, or another model."
        got = f"{kinds} kinds of block"
        raise ModelError(Fault("model", "blocks that all have the same parameters", got, cure))
    one = resized(config, with_blocks(config, anatomy, directory, (0,), trust_remote_code=trust_remote_code))
    return couplings_of_one(one, directory, trust_remote_code=trust_remote_code)


def couplings_of_one(
    config: Any, directory: Path, *, heads_only: bool = False, trust_remote_code: bool = False
) -> Couplings:
    """The couplings of a model of one block.

    Args:
        config: of that model.
        directory: where code of the model's own would lie.
        heads_only: leave the neurons out, which takes most of the time.
        trust_remote_code: whether that code may run.

    Raises:
        ModelError: it cannot be run on token ids alone.
    """
    probe = _probe(config, directory, trust_remote_code)
    anatomy = anatomy_of(probe)
    inputs, outputs = _run(probe, anatomy)
    ffn: list[Coupling] = []
    heads: list[Coupling] = []
    for name, input_MN in inputs.items():
        if len(input_MN) != SEQUENCES * TOKENS or not input_MN.requires_grad:
            continue
        mixes = _mixes_tokens(input_MN, outputs)
        if heads_only and not mixes:
            continue
        found = _coupling(input_MN, outputs, mixes=mixes)
        if found is not None:
            units, makers = found
            block = f"{anatomy.blocks[0]}."
            relative = {maker.removeprefix(block): owner for maker, owner in makers.items()}
            size = input_MN.shape[1] // units
            (heads if mixes else ffn).append(Coupling(name.removeprefix(block), relative, units, size))
    return Couplings(tuple(ffn), tuple(heads))


def kinds_of_block(anatomy: Anatomy) -> int:
    """How many kinds of block there are, by the names and shapes of their parameters."""
    return len({_inside(anatomy, block) for block in anatomy.blocks})


def _inside(anatomy: Anatomy, block: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (name.removeprefix(f"{block}."), shape)
        for name, shape in anatomy.parameter_shapes.items()
        if anatomy.block_of(name) == block
    )


def _probe(config: Any, directory: Path, trust_remote_code: bool) -> nn.Module:
    """A model in float32 that has random weights where it has no linear layer, which stay on meta.

    Those of more than :data:`LARGE` entries in three axes or more repeat one part along the first.
    """
    small = resized(config, {"vocab_size": VOCABULARY})
    for name in SPECIAL:
        token = getattr(small, name, None)
        if isinstance(token, int) and token >= VOCABULARY:
            setattr(small, name, None)
    cls: Any = model_class(small, directory, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = cls._from_config(deepcopy(small), dtype=torch.float32, attn_implementation="eager")
    linears = anatomy_of(model).linears
    for name, buffer in list(model.named_buffers()):
        assign(model, name, torch.zeros_like(buffer, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in list(model.named_parameters()):
            if name.rpartition(".")[0] not in linears:
                repeats = parameter.dim() > 2 and parameter.numel() > LARGE
                value = 1 + 0.2 * torch.randn(parameter.shape[1:] if repeats else parameter.shape)
                assign(model, name, value.expand(parameter.shape))
        fill_buffers(model, torch.device("cpu"))
    return model.eval().requires_grad_(False)


def _run(model: nn.Module, anatomy: Anatomy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each layer of the block reads, (M, N), and the leaf (M, F) that it gives instead of a product."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    chance = torch.Generator().manual_seed(0)

    def stand_in(name: str) -> Callable[[Tensor], Tensor]:
        linear = anatomy.linears[name]

        def forward(input: Tensor) -> Tensor:
            leaf = torch.randn(*input.shape[:-1], linear.out_features, generator=chance)
            if linear.block is not None:
                inputs[name] = input.flatten(0, -2)
                outputs[name] = leaf = leaf.requires_grad_()
            return leaf.clone()  # some models add to it in place

        return forward

    ids = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS) % (VOCABULARY - 3) + 3
    try:
        with computing((model.get_submodule(name), stand_in(name)) for name in anatomy.linears):
            model(input_ids=ids)
    except Exception as error:  # whatever a model's own code raises
        cure = "Cut layers only, or another model."
        got = f"{type(error).__name__}: {error}"
        raise ModelError(Fault("model", "a block that runs on token ids alone", got, cure)) from error
    return inputs, outputs


def _felt(input_MN: Tensor, outputs: Mapping[str, Tensor], seen_MN: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each maker that the inputs where ``seen_MN`` is not 0 depend on, and its gradient (M, F)."""
    grads = torch.autograd.grad(
        input_MN, list(outputs.values()), seen_MN, retain_graph=True, allow_unused=True
    )
    for (name, leaf), grad in zip(outputs.items(), grads, strict=True):
        if grad is not None:
            yield name, grad.reshape(-1, leaf.shape[-1])


def _mixes_tokens(input_MN: Tensor, outputs: Mapping[str, Tensor]) -> bool:
    """Whether what is read at a token depends on what was made at another."""
    at = TOKENS // 2
    seen_MN = torch.zeros_like(input_MN)
    seen_MN[at] = 1 + torch.rand(input_MN.shape[1], generator=torch.Generator().manual_seed(1))
    elsewhere = torch.arange(len(input_MN)) != at
    return any(bool(grad_MF[elsewhere].any()) for _, grad_MF in _felt(input_MN, outputs, seen_MN))


def _coupling(
    input_MN: Tensor, outputs: Mapping[str, Tensor], *, mixes: bool
) -> tuple[int, dict[str, Tensor]] | None:
    """The most units that the inputs of a reader fall into, and the unit of each output of its makers."""
    width = input_MN.shape[1]
    for units in range(width, 0, -1) if mixes else (width,):
        if width % units == 0:
            makers = _owners(input_MN, outputs, units)
            if makers:
                return units, makers
    return None


def _owners(input_MN: Tensor, outputs: Mapping[str, Tensor], units: int) -> dict[str, Tensor] | None:
    """The unit (F,) that each output of each maker belongs to; None where one belongs to several, or none.

    The bits of the number are found one by one: inputs whose unit has the bit, and inputs whose unit has not.
    """
    unit_N = torch.arange(units).repeat_interleave(input_MN.shape[1] // units)
    chance = torch.Generator().manual_seed(2)  # random factors, so that no two gradients cancel
    owners: dict[str, Tensor] = {}
    for bit in range(max(1, (units - 1).bit_length())):
        has_N = (unit_N >> bit) & 1 == 1
        factor_MN = 1 + torch.rand(input_MN.shape, generator=chance)
        with_bit = {n: g.any(0) for n, g in _felt(input_MN, outputs, factor_MN * has_N)}
        without = {n: g.any(0) for n, g in _felt(input_MN, outputs, factor_MN * ~has_N)}
        for name in with_bit:
            either_F = with_bit[name] | without[name]
            if not bool(either_F.any()) and name not in owners:
                continue
            if not bool(either_F.all()) or bool((with_bit[name] & without[name]).any()):
                return None
            owner_F = owners.setdefault(name, torch.zeros(len(either_F), dtype=torch.int64))
            owner_F += with_bit[name].long() << bit
    shares = (torch.bincount(owner_F, minlength=units) for owner_F in owners.values())
    return owners if all(len(s) == units and bool((s == s[0]).all()) for s in shares) else None
