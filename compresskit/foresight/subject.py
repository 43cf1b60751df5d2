"""A stage that trains, as a forecast sees it: what it holds, what is done to its model, who teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from compresskit.calibration.oneshot import largest_layer
from compresskit.distill.placements import PLACEMENTS
from compresskit.distill.placements.base import Teaching as Asked
from compresskit.distill.vocabulary import shared_vocabulary, vocabulary_of
from compresskit.errors import Fault
from compresskit.foresight.activations import Pass, forward_bytes, stretched, traced
from compresskit.foresight.peak import Teaching, Units
from compresskit.foresight.sketch import sketched
from compresskit.foresight.split import local_shapes, split
from compresskit.foresight.states import ITEM, Held, Shape
from compresskit.modeling import ModelSource, context_length
from compresskit.options import Choice, choices_of
from compresskit.quant.qlora import Qlora
from compresskit.quant.qlora_outlook import BASE_BYTES, SCALE_BYTES, held_bytes
from compresskit.sparse import TRAINED_PRUNERS
from compresskit.stage import Outlook
from compresskit.targets import select
from compresskit.training.adapters.outlook import as_stored_layers, trained_parameters
from compresskit.training.bias_norm import biases_and_norms
from compresskit.training.lesson import TEXT_ALONE
from compresskit.training.outlook import LONGEST_ROW, live_copy_bytes
from compresskit.training.rules.asynchronous import ALONE
from compresskit.training.rules.base import adapter_of
from compresskit.training.trainable import ALL, LOW_RANK

LORA, BIAS_NORM = "lora", "bias_norm"
LIVE_TEACHERS = ("replicate", "shard", "8bit", "4bit")
TRACED = (
    "activation_checkpointing",
    "checkpoint_blocks",
    "checkpoint_operators",
    "offload_activations",
    "tensor_parallel",
)
"""Fields that decide what a pass keeps."""

KNOWN: dict[Any, Pass] = {}
"""Passes of models of which all is trained, by all that they depend on: one that was traced is not again."""


class Updated(nn.Module):
    """A frozen linear layer with a low-rank update, as peft computes it.

    Args:
        base: the layer.
        inputs: I, of it.
        outputs: O.
        rank: of the update.
    """

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Linear(n, m, bias=False) for n, m in ((inputs, rank), (rank, outputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer makes, and the update's part."""
        made: Tensor = self.base(inputs) + self.up(self.down(inputs)) * 2.0
        return made


@dataclass(frozen=True)
class Subject:
    """A stage that trains.

    Attributes:
        name: of the stage in its chain, such as ``2-distill``.
        stage: its fields.
        model: what it will be given.
        teacher: opened or sketched; None where it learns from text alone.
    """

    name: str
    stage: Any
    model: Outlook
    teacher: ModelSource | None = None
    _passes: dict[Any, Pass] = field(default_factory=dict, repr=False, compare=False)
    _forwards: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tokens(self) -> int:
        """Of a row."""
        return self.stage.context_length or min(context_length(self.model.config), LONGEST_ROW)

    @cached_property
    def trains_all(self) -> bool:
        """Whether every parameter takes a gradient."""
        return self._adapter == "" and getattr(self.stage, "trainable", ALL) == ALL

    @property
    def _adapter(self) -> str:
        """Its name; empty where none is trained."""
        return adapter_of(self.stage)

    def shapes(self, stage: Any) -> dict[str, Shape]:
        """Of the model's parameters, tied ones once, as far as a rank has of split layers."""
        anatomy = self.model.anatomy
        again = {name for group in anatomy.tied for name in group[1:]}
        whole = {n: s for n, s in anatomy.parameter_shapes.items() if n not in again}
        return local_shapes(self.model.config, anatomy, whole, stage.tensor_parallel)

    def stored(self, stage: Any) -> dict[str, Shape]:
        """As :meth:`shapes`, in float32 numbers of memory: weights frozen in fewer bits are fewer."""
        shapes = self.shapes(stage)
        items = {f"{name}.weight": item for name, item in self._frozen_items(stage).items()}
        return {n: (round(prod(s) * items[n] / ITEM),) if n in items else s for n, s in shapes.items()}

    def _frozen_items(self, stage: Any) -> dict[str, float]:
        """Layer -> bytes of one of its weights, of those that an adapter's model is not frozen in float32."""
        if not self._adapter:
            return {}
        layers = select(self.model.anatomy, stage.targets, stage.ignore)
        items = dict(held_bytes(stage, self.model, layers)) if isinstance(stage, Qlora) else {}
        if self.model.weight_bytes == 2:
            items = dict.fromkeys(as_stored_layers(self.model.anatomy), 2.0) | items
        return items

    def held(self, stage: Any) -> Held:
        """What ``stage``, which is this one with another strategy, trains and holds."""
        shapes = self.shapes(stage)
        every = tuple(shapes.values())
        if self._adapter:
            return self._adapted(stage)
        trainable = getattr(stage, "trainable", ALL)
        if trainable == BIAS_NORM:
            few = set(biases_and_norms(self.model.anatomy))
            trained = tuple(s for n, s in shapes.items() if n in few)
            return Held(trained, tuple(s for n, s in shapes.items() if n not in few))
        if stage.kind == "sparse_train":
            return self._sparse(stage, every)
        extra = 0
        if stage.kind == "qat":
            layers = list(stage.form.schemes(self.model.anatomy))
            anatomy = self.model.anatomy
            extra = live_copy_bytes(stage, anatomy, layers) + 13 * largest_layer(anatomy, layers)
        return Held(every, extra_bytes=extra)

    def _factors(self, stage: Any) -> tuple[Shape, ...]:
        linears = self.model.anatomy.linears
        layers = [linears[name] for name in select(self.model.anatomy, stage.targets, stage.ignore)]
        pairs = [((stage.rank, n.in_features), (n.out_features, stage.rank)) for n in layers]
        return tuple(shape for pair in pairs for shape in pair)

    def _adapted(self, stage: Any) -> Held:
        """Weights that are frozen as they are stored or in few bits, and an adapter."""
        anatomy, linears = self.model.anatomy, self.model.anatomy.linears
        layers = select(anatomy, stage.targets, stage.ignore)
        each = held_bytes(stage, self.model, layers) if isinstance(stage, Qlora) else {}
        counts = {name: linears[name].out_features * linears[name].in_features for name in each}
        halves = [n for n in each if stage.base == "nf4" and n not in self.model.layer_bits]
        packed = sum((BASE_BYTES["nf4"] - SCALE_BYTES) * counts[name] for name in halves)
        whole = sum(each[name] * counts[name] for name in each) - packed
        stored = self.stored(stage)
        frozen = tuple(shape for name, shape in stored.items() if name.removesuffix(".weight") not in each)
        # While a layer computes, or its gradient is carried back, its weight is there in float32.
        extra = 4 * largest_layer(anatomy, tuple(each) or tuple(self._frozen_items(stage)))
        if self._adapter == LORA:
            trained = self._factors(stage)
        else:
            count = trained_parameters(self._adapter, stage.rank, anatomy, self.model.config, layers)
            trained = ((count,),)
        return Held(trained, frozen, round(packed), round(whole), extra)

    def _sparse(self, stage: Any, every: tuple[Shape, ...]) -> Held:
        """What zeros need that change while the model trains."""
        anatomy, layers = self.model.anatomy, tuple(stage.patterns(self.model))
        method: Any = TRAINED_PRUNERS[stage.method]
        shapes = self.shapes(stage)
        weights = tuple(shapes[f"{n}.weight"] for n in layers if f"{n}.weight" in shapes)
        extra = live_copy_bytes(stage, anatomy, layers) if stage.swaps_layers else 0
        extra += 5 * largest_layer(anatomy, layers)
        if method.learns_masks:
            each = cast(Any, stage.pruner(str(stage.pattern))).logits_per_weight
            return Held(tuple((round(each * prod(s)),) for s in weights), every, extra_bytes=extra)
        if method.learns_scores:
            return Held((*every, *weights), extra_bytes=extra)
        return Held(every, extra_bytes=extra + (4 * sum(map(prod, weights)) if method.needs_gradient else 0))

    def units(self, stage: Any) -> Units:
        """What FSDP2 gathers together."""
        anatomy, blocks = self.model.anatomy, dict[str | None, int]()
        shapes = self.stored(stage)
        for name, shape in shapes.items():
            block = anatomy.block_of(name)
            blocks[block] = blocks.get(block, 0) + prod(shape)
        outside = blocks.pop(None, 0)
        embedding = prod(shapes.get(f"{anatomy.embeddings}.weight", (0,)))
        tied = any(f"{anatomy.head}.weight" in group for group in anatomy.tied)
        return Units(
            block=max(blocks.values(), default=0),
            tail=outside if tied else outside - embedding,
            embedding=embedding,
            is_tied=tied,
        )

    def passed(self, stage: Any, rows: int, *, accumulates: bool = False) -> Pass:
        """A pass of ``rows`` rows: traced with one row and two, which tell what each more takes.

        Args:
            stage: this one with another strategy.
            rows: of the pass.
            accumulates: whether there are gradients already, to which it adds.
        """
        one, two = (self._traced(stage, count, accumulates) for count in (1, 2))
        return one.plus(two.plus(one, -1.0), rows - 1)

    def _traced(self, stage: Any, rows: int, accumulates: bool) -> Pass:
        key: tuple[Any, ...] = (rows, accumulates, *(getattr(stage, name, None) for name in TRACED))
        if self.trains_all:  # nothing else of the stage matters then
            model = self.model
            key = (self.tokens, stage.precision, str(model.original), model.config.to_json_string(), *key)
        known = KNOWN if self.trains_all else self._passes
        if key not in known:
            plain = replace(stage, matmul="float")  # what int8 products keep is no more than this
            two, four = (
                traced(
                    self.model.config,
                    self.model.original,
                    plain,
                    rows=rows,
                    tokens=self.tokens,
                    blocks=count,
                    prepare=partial(self._prepare, ways=stage.tensor_parallel),
                    accumulates=accumulates,
                    trust_remote_code=self.model.trust_remote_code,
                )
                for count in (2, 4)
            )
            known[key] = stretched(two, four, len(self.model.anatomy.blocks))
        return known[key]

    def _prepare(self, model: nn.Module, ways: int) -> None:
        """Split layers; freeze what is not trained; add adapters, others than LoRA as LoRA of their rank."""
        from compresskit.modeling.anatomy import anatomy_of

        if ways > 1:
            split(model, ways)
        if self.trains_all:
            return
        anatomy = anatomy_of(model)
        model.requires_grad_(False)
        if getattr(self.stage, "trainable", "") == BIAS_NORM:
            for name in biases_and_norms(anatomy):
                model.get_parameter(name).requires_grad_(True)
            return
        for name in select(anatomy, self.stage.targets, self.stage.ignore):
            parent, _, child = name.rpartition(".")
            linear, owner = anatomy.linears[name], model.get_submodule(parent)
            updated = Updated(getattr(owner, child), linear.in_features, linear.out_features, self.stage.rank)
            setattr(owner, child, updated)

    def teaching(self, stage: Any, rows: int, tokens: int) -> Teaching:
        """What the teacher takes in each process, placed as ``stage`` says."""
        if self.teacher is None:
            return Teaching()
        placed, asked = placement_of(stage), self._asked(stage)
        held = placed.held_bytes(stage, self.model, asked)
        if stage.teacher_placement.method not in LIVE_TEACHERS:
            return Teaching(held=held)
        source, dtype = self.teacher, self._dtype(stage)
        width = int(source.config.get_text_config().hidden_size)
        signal = rows * tokens * width * dtype.itemsize
        if stage.teacher_placement.method == "shard":  # its output projection is whole meanwhile
            signal += shared_vocabulary(vocabulary_of(self.model.config), source) * width * dtype.itemsize
        passing = self._forward(rows, tokens, dtype)
        if "bit" in stage.teacher_placement.method:
            linears = source.anatomy.linears.values()
            passing += dtype.itemsize * max(n.out_features * n.in_features for n in linears if n.block)
        return Teaching(held=held, passing=passing, signal=signal)

    def _dtype(self, stage: Any) -> torch.dtype:
        asked = dict(stage.teacher_placement.options).get("dtype", "auto")
        assert self.teacher is not None
        return self.teacher.compute_dtype if asked == "auto" else getattr(torch, asked)

    def _forward(self, rows: int, tokens: int, dtype: torch.dtype) -> float:
        source = self.teacher
        assert source is not None
        for count in (1, 2):
            if count not in self._forwards:
                self._forwards[count] = forward_bytes(
                    source.config,
                    source.directory,
                    rows=count,
                    tokens=tokens,
                    dtype=dtype,
                    trust_remote_code=source.trust_remote_code,
                )
        return self._forwards[1] + (rows - 1) * (self._forwards[2] - self._forwards[1])

    def _asked(self, stage: Any) -> Asked:
        assert self.teacher is not None
        return Asked(
            teacher=self.teacher,
            vocabulary=shared_vocabulary(vocabulary_of(self.model.config), self.teacher),
            losses=() if stage.loss == TEXT_ALONE else choices_of(stage.loss),
            trust_remote_code=self.model.trust_remote_code,
        )

    def placement_faults(self, stage: Any, where: str) -> list[Fault]:
        """Why the teacher cannot be placed as ``stage`` says."""
        if self.teacher is None or stage.teacher_placement.method not in LIVE_TEACHERS:
            return []
        found: list[Fault] = placement_of(stage).faults(stage, self.model, self._asked(stage), where)
        return found


def placement_of(stage: Any) -> Any:
    """Where the teacher of ``stage`` lives."""
    placed: Choice = stage.teacher_placement
    return PLACEMENTS[placed.method](**dict(placed.options))


def with_teacher(stage: Any) -> bool:
    """Whether a stage that trains learns from a teacher."""
    if not hasattr(stage, "teacher_placement"):
        return False
    return bool(stage.loss != TEXT_ALONE or stage.features is not None)


def teacher_of(stage: Any, model: ModelSource) -> ModelSource | None:
    """The teacher of ``stage``, sketched where it has no weights; without a name the first model."""
    if not with_teacher(stage):
        return None
    if stage.teacher is None:
        return model
    return sketched(stage.teacher, trust_remote_code=model.trust_remote_code)


def untold(stage: Any) -> tuple[str, ...]:
    """What of ``stage`` a forecast leaves out, in full sentences."""
    told: Mapping[str, bool] = {
        "What feature losses keep of blocks is not counted.": getattr(stage, "features", None) is not None,
        "Text that the student generates is not counted.": getattr(stage, "on_policy", None) is not None,
        "Products in int8 are timed and weighed as those in float.": stage.matmul != "float",
        "Products in fp8 are timed and weighed as those in bf16.": stage.precision == "fp8",
        "Activations that wait on the host are counted on the device.": stage.offload_activations,
        f"The first {stage.synchronise_from} steps, which average gradients, are timed as the others are.": (
            stage.synchronise in ALONE and stage.synchronise_from > 0
        ),
        f"Adapter {adapter_of(stage)} is weighed as LoRA of its rank.": adapter_of(stage)
        not in (*LOW_RANK, ""),
    }
    return tuple(sentence for sentence, holds in told.items() if holds)
