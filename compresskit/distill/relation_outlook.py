"""What can be told of a relation loss before weights are read: which heads there are, and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.distill.mapping import Pairs
from compresskit.distill.relation import KINDS, Relation
from compresskit.errors import Fault
from compresskit.modeling import ModelSource
from compresskit.modeling.attention import attended_shapes
from compresskit.modeling.skeleton import skeleton_of
from compresskit.options import Choice
from compresskit.training.fields import TrainingFields
from compresskit.training.outlook import pass_tokens
from compresskit.training.setting import Setting, launched_processes

if TYPE_CHECKING:
    from compresskit.stage import Outlook

COPIES = 6
"""Of a matrix of relations that a pass keeps: both models' log-probabilities, and what gradients need."""


def relation_faults(
    named: Choice, pairs: Pairs, model: Outlook, teacher: ModelSource, where: str
) -> list[Fault]:
    """What is wrong with comparing what the attention of these blocks is given.

    Args:
        named: a loss that takes attention, with fields of its own that have no faults of type.
        pairs: of blocks.
        model: the student to be.
        teacher: opened, its weights unread.
        where: prefix of each fault.
    """
    loss: Any = Relation(**{name: value for name, value in named.options if name != "layers"})
    faults = []
    if unknown := [kind for kind in loss.of if kind not in KINDS] or not loss.of:
        got = ", ".join(map(repr, unknown)) if isinstance(unknown, list) else "none"
        faults.append(Fault(f"{where}.of", f"some of {', '.join(KINDS)}", got, "Choose among these."))
    sides = (
        (model.config, model.original, model.anatomy),
        (teacher.config, teacher.directory, teacher.anatomy),
    )
    for place, (side, (config, directory, anatomy)) in enumerate(
        zip(("student", "teacher"), sides, strict=True)
    ):
        skeleton = skeleton_of(config, directory, trust_remote_code=model.trust_remote_code)
        names = [anatomy.blocks[pair[place]] for pair in pairs]
        shapes = attended_shapes(skeleton, names)
        if missing := [name for name in names if name not in shapes]:
            got = f"none in {missing[0]} of the {side}, a {type(config).__name__}"
            expected = "blocks that hand queries, keys and values to an attention of transformers"
            faults.append(Fault(where, expected, got, "Choose other layers, or another feature loss."))
        widths = sorted({shape[2] * shape[3] for found in shapes.values() for shape in found})
        heads = loss.relation_heads
        if heads and any(width % heads for width in widths):
            got = f"{heads} of widths {', '.join(map(str, widths))} in the {side}"
            cure = "Choose another number, or leave relation_heads out."
            faults.append(Fault(f"{where}.relation_heads", "a number that divides all widths", got, cure))
    return faults


def relation_bytes(named: Choice, fields: TrainingFields, model: Outlook) -> int:
    """Of the relations of one pair of blocks, in one forward pass and backward."""
    given = dict(named.options)
    heads: Any = given.get("relation_heads") or getattr(model.config, "num_attention_heads", 1)
    rows = Setting(fields, launched_processes() or fields.processes, "cpu").micro_batch_size
    tokens = pass_tokens(fields, model.config)
    return int(4 * COPIES * len(given.get("of", KINDS)) * heads * tokens * (tokens // rows))
