"""Which linear layers make the neurons of a feed-forward network, and which one reads them. No list of names.

A neuron may be taken away where one linear layer (the reader, ``down``) has N inputs and its input j at a
token depends on nothing but output j (or j, N + j, ... where several are fused) at that very token of the
layers just before it (the makers: gate and up, or fc1). That is seen by differentiating a small model made of
one block of the real widths: attention mixes tokens and heads, norms mix neurons, so both are told apart.

Shapes: T = tokens (of one sequence), N = neurons, F = outputs of a maker.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.errors import Fault, ModelError
from compresskit.modeling.anatomy import Anatomy, anatomy_of
from compresskit.modeling.skeleton import model_class
from compresskit.sparse.resize import resized, with_blocks

PROBE_VOCABULARY = 64
PROBE_TOKENS = 7


@dataclass(frozen=True, slots=True)
class Coupling:
    """The neurons of one block's feed-forward network; names are relative to the block.

    Attributes:
        down: the layer that reads them.
        makers: the layers that make them, and how many outputs of each belong to one neuron.
        neurons: N.
    """

    down: str
    makers: tuple[tuple[str, int], ...]
    neurons: int


def find_couplings(
    config: Any, anatomy: Anatomy, directory: Path, *, trust_remote_code: bool = False
) -> tuple[Coupling, ...]:
    """The couplings that every block of a model has.

    Args:
        config: of the model; not changed.
        anatomy: of the model.
        directory: where code of the model's own would lie.
        trust_remote_code: whether that code may run.

    Returns:
        Usually one; none where no neuron can be told from the others.

    Raises:
        ModelError: the blocks differ, or a block of it cannot be run by itself.
    """
    names = {_inside(anatomy, block) for block in anatomy.blocks}
    if len(names) != 1:
        cure = "Cut layers only, or another model."
        raise ModelError(
            Fault("ffn", "blocks that all have the same layers", f"{len(names)} kinds of block", cure)
        )
    probe = _probe(config, anatomy, directory, trust_remote_code)
    small = anatomy_of(probe)
    block = small.blocks[0]
    inputs, outputs = _run(probe, [name for name in small.linears if small.linears[name].block == block])
    found = []
    for name, input_TN in inputs.items():
        makers = _makers(input_TN, outputs)
        if makers:
            relative = tuple((m.removeprefix(f"{block}."), times) for m, times in makers.items())
            found.append(Coupling(name.removeprefix(f"{block}."), relative, input_TN.shape[1]))
    return tuple(found)


def _inside(anatomy: Anatomy, block: str) -> tuple[tuple[str, int, int], ...]:
    return tuple(
        (name.removeprefix(f"{block}."), linear.out_features, linear.in_features)
        for name, linear in anatomy.linears.items()
        if linear.block == block
    )


def _probe(config: Any, anatomy: Anatomy, directory: Path, trust_remote_code: bool) -> nn.Module:
    """One block of the real widths with random weights, on the CPU in float32."""
    one = with_blocks(config, anatomy, directory, (0,), trust_remote_code=trust_remote_code)
    changes = {**one, "vocab_size": PROBE_VOCABULARY}
    small = resized(config, changes)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(small, name, None)
        if isinstance(token, int) and token >= PROBE_VOCABULARY:
            setattr(small, name, None)
    cls: Any = model_class(small, directory, trust_remote_code=trust_remote_code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls._from_config(deepcopy(small), dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def _run(model: nn.Module, layers: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each layer's input as a function of the layers just before it, and each layer's output as a leaf."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0].flatten(0, -2)
            # A leaf: nothing that lies before this layer is seen by what comes after it.
            outputs[name] = output.detach().flatten(0, -2).requires_grad_()
            return outputs[name].view_as(output).clone()  # some models add to it in place

        return module.register_forward_hook(hook)

    handles = [keep(name, model.get_submodule(name)) for name in layers]
    try:
        model(input_ids=torch.arange(3, 3 + PROBE_TOKENS).unsqueeze(0))
    except Exception as error:  # whatever a model's own code raises
        cure = "Cut layers only, or another model."
        got = f"{type(error).__name__}: {error}"
        raise ModelError(Fault("ffn", "a block that runs on token ids alone", got, cure)) from error
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs


def _makers(input_TN: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The layers whose outputs make the neurons that ``input_TN`` holds; empty if those are no neurons."""
    if input_TN.shape[0] != PROBE_TOKENS or not input_TN.requires_grad:
        return {}
    token, neurons = PROBE_TOKENS // 2, input_TN.shape[1]
    alive = input_TN[token].nonzero().flatten().tolist()  # ReLU lets no gradient through a dead one
    makers: dict[str, int] = {}
    for j in [alive[i] for i in (0, len(alive) // 2, -1)] if alive else []:
        grads = torch.autograd.grad(
            input_TN[token, j], list(outputs.values()), retain_graph=True, allow_unused=True
        )
        felt = {name: g for name, g in zip(outputs, grads, strict=True) if g is not None and bool(g.any())}
        times = {name: _times(g, token, j, neurons) for name, g in felt.items()}
        if not times or 0 in times.values() or (makers and makers != times):
            return {}
        makers = times
    return makers


def _times(grad_TF: Tensor, token: int, j: int, neurons: int) -> int:
    """How many outputs of a maker belong to a neuron; 0 if the gradient reaches anything else."""
    times, rest = divmod(grad_TF.shape[1], neurons)
    if rest or times == 0 or grad_TF.shape[0] != PROBE_TOKENS:
        return 0
    own_TF = torch.zeros_like(grad_TF, dtype=torch.bool)
    own_TF[token, j::neurons] = True
    return times if torch.equal(grad_TF != 0, own_TF) else 0
