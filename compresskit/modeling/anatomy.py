"""What a model consists of, found by looking at its skeleton: blocks, linear layers, tied weights.

Nothing here is a list of model families. Blocks are the repeated module list that holds most parameters;
linear layers are ``torch.nn.Linear`` and GPT-2's ``Conv1D``, which stores its weight (I, O).

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer.

    Attributes:
        name: qualified module name.
        out_features: O.
        in_features: I.
        block: name of the block it is in; None outside the blocks.
        transposed: its parameter is stored (I, O).
        has_bias: whether it adds a bias.
        tied: its weight is another module's too, such as the token embedding's.
        is_plain: it computes as ``torch.nn.Linear`` does, not as a subclass or Conv1D may.
    """

    name: str
    out_features: int
    in_features: int
    block: str | None
    transposed: bool
    has_bias: bool
    tied: bool
    is_plain: bool = True


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a model.

    Attributes:
        blocks: qualified names of the repeated blocks, in order of execution.
        linears: every linear layer by qualified name, in the model's order.
        tied: groups of parameter names that are one parameter; the first of each is the one stored.
        head: name of the output layer that makes logits, if it is a linear layer.
        embeddings: name of the token embedding.
        is_causal: the model predicts the next token.
        num_parameters: tied parameters counted once.
        parameter_shapes: every parameter name, tied ones included, and its shape as stored.
    """

    blocks: tuple[str, ...]
    linears: Mapping[str, Linear]
    tied: tuple[tuple[str, ...], ...]
    head: str | None
    embeddings: str | None
    is_causal: bool
    num_parameters: int
    parameter_shapes: Mapping[str, tuple[int, ...]]

    def block_of(self, name: str) -> str | None:
        """The block that the module or parameter ``name`` lies in; None outside the blocks."""
        return _block_of(name, self.blocks)


def anatomy_of(model: nn.Module) -> Anatomy:
    """Look at ``model``.

    Args:
        model: any transformers model, usually a skeleton on the meta device; not changed.

    Returns:
        Its parts. ``blocks`` is empty where nothing in it is repeated.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = tied_groups(model)
    again = {name for group in tied for name in group}
    blocks = _blocks(model)
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            transposed = isinstance(module, Conv1D)
            first, second = module.weight.shape
            linears[name] = Linear(
                name=name,
                out_features=second if transposed else first,
                in_features=first if transposed else second,
                block=_block_of(name, blocks),
                transposed=transposed,
                has_bias=module.bias is not None,
                tied=f"{name}.weight" in again,
                is_plain=type(module).forward is nn.Linear.forward,
            )
    head = _name_in(model, "get_output_embeddings")
    return Anatomy(
        blocks=blocks,
        linears=linears,
        tied=tied,
        head=head if head in linears else None,
        embeddings=_name_in(model, "get_input_embeddings"),
        is_causal=_is_causal(model),
        num_parameters=sum(prod(p.shape) for p in model.parameters()),
        parameter_shapes=shapes,
    )


def tied_groups(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names that are one and the same parameter of ``model``, each group in the model's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    best: tuple[str, ...] = ()
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(child) for child in module}) != 1:
            continue
        size = sum(prod(p.shape) for p in module.parameters())
        if size > most:  # a list inside a block (experts, say) is never larger than the list of blocks
            most, best = size, tuple(f"{name}.{i}" for i in range(len(module)))
    return best


def _block_of(name: str, blocks: tuple[str, ...]) -> str | None:
    if not blocks:
        return None
    stem = blocks[0].rpartition(".")[0] + "."
    if not name.startswith(stem):
        return None
    block = stem + name.removeprefix(stem).partition(".")[0]
    return block if block in blocks else None


def _name_in(model: nn.Module, getter: str) -> str | None:
    """The qualified name of the module that ``model.getter()`` returns."""
    try:
        wanted = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _is_causal(model: nn.Module) -> bool:
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True
    can_generate = getattr(model, "can_generate", None)
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(can_generate and can_generate() and not is_encoder_decoder)
