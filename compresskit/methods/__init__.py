"""Where a recipe names methods, and how their own fields are written there: one table. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from compresskit.distill import FEATURE_LOSSES, LOSSES, SENTENCE_LOSSES
from compresskit.distill.align import ALIGNMENTS
from compresskit.distill.placements import PLACEMENTS
from compresskit.quant import QUANTIZERS
from compresskit.registry import Registry
from compresskit.sparse import ALLOCATIONS, PRUNERS, RECOVERIES, STRUCTURED_PRUNERS, TRAINED_PRUNERS
from compresskit.sparse.structured import IMPORTANCES
from compresskit.training.lesson import NO_ALIGNMENT, TEXT_ALONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Methods of which a field of a stage names one.

    Attributes:
        title: what they are.
        tables: their names.
        stages: kinds of the stages that have the field.
        key: the field. The methods' own fields stand beside the key ``method``, and with any other key in a
            mapping with it.
        of: the method whose field it is, where it is not the stage's; it takes a name alone.
        others: what the field takes besides names of methods.
        several: whether a list may stand there.
        reserved: fields of the methods that the stage fills in.
        example: a name and fields of that method; where the field is a method's, of the latter.
    """

    title: str
    tables: tuple[Registry[Any], ...]
    stages: tuple[str, ...]
    key: str
    of: str = ""
    others: tuple[str, ...] = ()
    several: bool = False
    reserved: tuple[str, ...] = ()
    example: tuple[str, Mapping[str, Any]] = field(hash=False)

    @property
    def is_beside(self) -> bool:
        """Whether the methods' own fields stand beside those of the stage."""
        return self.key == "method"

    def classes(self) -> Iterator[tuple[str, type[Any]]]:
        """Each name with its class, whose fields are the method's; imports what the class needs."""
        return ((name, table[name]) for table in self.tables for name in table)


TAUGHT = ("distill", "qat", "sparse_train")
"""Kinds of the stages that may have a teacher."""

FAMILIES = (
    Family(
        title="Pruners",
        tables=(PRUNERS, STRUCTURED_PRUNERS),
        stages=("prune",),
        key="method",
        reserved=("pattern",),
        example=("sparsegpt", {"damping": 0.05}),
    ),
    Family(
        title="What `cut` keeps by",
        tables=(IMPORTANCES,),
        stages=("prune",),
        key="importance",
        of="cut",
        example=("taylor", {"parameters": 0.5}),
    ),
    Family(
        title="How zeros are divided among layers",
        tables=(ALLOCATIONS,),
        stages=("prune",),
        key="allocation",
        example=("owl", {"spread": 0.1}),
    ),
    Family(
        title="What follows upon pruning",
        tables=(RECOVERIES,),
        stages=("prune",),
        key="recover",
        example=("reconstruct", {"epochs": 4}),
    ),
    Family(
        title="Pruners that train",
        tables=(TRAINED_PRUNERS,),
        stages=("sparse_train",),
        key="method",
        reserved=("pattern",),
        example=("rigl", {"drop_fraction": 0.2}),
    ),
    Family(
        title="Quantisers",
        tables=(QUANTIZERS,),
        stages=("quantize",),
        key="method",
        example=("gptq", {"activation_order": False}),
    ),
    Family(
        title="Losses on a teacher's next tokens",
        tables=(LOSSES,),
        stages=TAUGHT,
        key="loss",
        others=(TEXT_ALONE,),
        several=True,
        example=("jsd", {"beta": 0.3}),
    ),
    Family(
        title="Losses on sentences",
        tables=(SENTENCE_LOSSES,),
        stages=("distill",),
        key="loss",
        several=True,
        example=("pairwise", {"pooling": "cls"}),
    ),
    Family(
        title="Losses on blocks",
        tables=(FEATURE_LOSSES,),
        stages=TAUGHT,
        key="features",
        several=True,
        example=("squarehead", {"layers": "last_2"}),
    ),
    Family(
        title="Teachers with another tokenizer",
        tables=(ALIGNMENTS,),
        stages=TAUGHT,
        key="alignment",
        others=(NO_ALIGNMENT,),
        example=("spans", {"top": 16}),
    ),
    Family(
        title="Where a teacher lives",
        tables=(PLACEMENTS,),
        stages=TAUGHT,
        key="teacher_placement",
        example=("server", {"url": "http://localhost:8000/v1", "model": "NAME"}),
    ),
)
