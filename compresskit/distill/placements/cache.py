"""What the teacher says is written down once, before training, and read from then on.

No torch at import.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from compresskit.distill import LOSSES
from compresskit.distill.placements.base import Teaching, packed_faults, row_tokens, with_blocks
from compresskit.errors import Fault
from compresskit.options import Within

if TYPE_CHECKING:
    from compresskit.stage import Outlook
    from compresskit.training.job import Part
    from compresskit.training.lesson import Taught

UNUSED = "Leave it out."
UNPACKED = "Use keep: top_k, or a teacher that was not quantised."
CACHED = "compresskit.distill.cache.provider:Cached"
TOP_K, SAMPLED, HIDDEN = KEEPS = ("top_k", "sampled", "hidden")
BF16, MODEL = PRECISIONS = ("bf16", "model")
IDS, MOST_IDS = 64, (1 << 16) - 1
PASS_TOKENS = 4096
"""Of one forward pass of the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One pass of the teacher over all rows; training then needs no teacher in memory.

    Attributes:
        keep: of each token ``top_k``, its likeliest ids and the probability of the rest; ``sampled``, ids
            drawn from the teacher's distribution; or ``hidden``, the hidden state, from which the teacher's
            output projection makes the whole distribution.
        k: ids of a token, or draws of it.
        precision: of hidden states on disk: ``bf16``, or ``model``, the type that the teacher computes in.
        dir: folder of the cache, where it shall have a name; else it has a folder of its own in the cache.
    """

    keep: str = TOP_K
    k: Annotated[int, Within(1, MOST_IDS)] = IDS
    precision: str = BF16
    dir: str | None = None

    def faults(self, stage: Taught, model: Outlook, teaching: Teaching, where: str) -> list[Fault]:
        """See ``Placement.faults``."""
        faults = [
            Fault(f"{where}.{name}", f"one of {', '.join(known)}", repr(value), "Choose one of these.")
            for name, value, known in (
                ("keep", self.keep, KEEPS),
                ("precision", self.precision, PRECISIONS),
            )
            if value not in known
        ]
        if teaching.blocks:
            cure = "Leave features out, or use a teacher that runs beside the student, such as replicate."
            faults.append(Fault(where, "a loss on what the teacher predicts", "features", cure))
        faults += _idle_faults(self, where)
        if self.keep == HIDDEN:
            faults += packed_faults(teaching.teacher, f"{where}.keep", UNPACKED)
        else:
            faults += self._loss_faults(teaching, where)
        if self.dir and Path(self.dir).expanduser().exists() and not Path(self.dir).expanduser().is_dir():
            faults.append(Fault(f"{where}.dir", "a folder", f"the file {self.dir}", "Name another one."))
        return faults

    def _loss_faults(self, teaching: Teaching, where: str) -> list[Fault]:
        """Why a few ids of each token do not do for these losses."""
        faults = []
        if self.keep == TOP_K and self.k > teaching.vocabulary:
            got = f"{self.k}, of {teaching.vocabulary} ids"
            faults.append(Fault(f"{where}.k", "at most as many ids as there are", got, "Lower k."))
        for choice in teaching.losses:
            options = dict(choice.options)
            top_k = options.get("top_k")
            if self.keep == SAMPLED and not (LOSSES[choice.method].linear_in_p and top_k is None):
                whole = choice.method if top_k is None else f"{choice.method} of the {top_k} likeliest ids"
                got = f"{whole}, which draws would give another gradient even on average"
                cure = "Use loss: forward_kl without top_k, or keep: top_k or hidden."
                expected = "a loss whose gradient is linear in the teacher's probabilities"
                faults.append(Fault(f"{where}.keep", expected, got, cure))
            elif self.keep == TOP_K and top_k not in (None, self.k):
                expected = f"as many ids as {choice.method} compares, {top_k}"
                cure = f"Set k: {top_k}, or leave top_k out of the loss, or keep: hidden."
                faults.append(Fault(f"{where}.k", expected, str(self.k), cure))
        return faults

    def held_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """See ``Placement.held_bytes``: of hidden states the output projection, else nothing."""
        if self.keep != HIDDEN:
            return 0
        teacher, head = teaching.teacher, f"{teaching.teacher.anatomy.head}.weight"
        rows, width = teacher.shape(head)
        return rows * width * teacher.compute_dtype.itemsize

    def before_bytes(self, stage: Taught, model: Outlook, teaching: Teaching) -> int:
        """See ``Preparatory``: the whole teacher, a pass of it, and the logits of a chunk of its tokens."""
        from compresskit.distill.cache.foresee import building_bytes

        tokens = max(PASS_TOKENS, row_tokens(stage, model))
        models = 2 if self.keep == HIDDEN else 1  # what is kept makes logits too, where both are compared
        return building_bytes(teaching.teacher, teaching.vocabulary, tokens, model.device, models=models)

    def notes(self, stage: Taught, model: Outlook, teaching: Teaching) -> tuple[str, ...]:
        """See ``Preparatory``: the size on disk, what making it takes, and how much of it is read."""
        from compresskit.distill.cache.choose import keep_of
        from compresskit.distill.cache.foresee import expected_tokens, in_words, read_in_words

        kept = keep_of(
            teaching.teacher,
            teaching.vocabulary,
            teaching.temperature,
            keep=self.keep,
            k=self.k,
            precision=self.precision,
        )
        tokens = expected_tokens(stage.data or model.data, model.tokenizer, model.trust_remote_code)
        said = (in_words(self.keep, kept.most_bytes(), tokens, teaching.teacher.bytes),)
        if tokens is None:
            return said
        fields: Any = stage  # every stage that is taught trains
        return (*said, read_in_words(tokens, row_tokens(stage, model), fields))

    def part(self, teaching: Teaching) -> Part:
        """See ``Placement.part``."""
        from compresskit.training.job import Part

        asked = {"keep": self.keep, "k": self.k, "precision": self.precision, "dir": self.dir}
        whose = with_blocks(teaching)
        del whose["blocks"]  # there are none
        return Part(CACHED, {**whose, "temperature": teaching.temperature, **asked})


def _idle_faults(cache: Cache, where: str) -> list[Fault]:
    """Fields that were set, though what is kept does not look at them."""
    idle = {"k": IDS} if cache.keep == HIDDEN else {"precision": BF16}
    return [
        Fault(f"{where}.{name}", f"nothing beside keep: {cache.keep}", str(getattr(cache, name)), UNUSED)
        for name, default in idle.items()
        if getattr(cache, name) != default
    ]
