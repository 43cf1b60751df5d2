"""What a plan can tell of dialogues before anything runs: how they are worded, and whether they can be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

from compresskit.data.corpus import open_corpus
from compresskit.data.dialogue import Dialogue
from compresskit.data.spec import DataSpec
from compresskit.errors import Fault, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOKED_AT = 200


def foresee(
    spec: DataSpec, where: str, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[list[Fault], tuple[str, ...]]:
    """Word the first dialogues of a source for a tokenizer; a data set of the hub is not fetched for that.

    Args:
        spec: a source that :func:`compresskit.data.check` finds no fault with.
        where: its place in the recipe, put before each fault's own place.
        tokenizer: opens the model's; called for dialogues only.

    Returns:
        What is wrong, and a sentence for the plan; neither for text.
    """
    from compresskit.data.render import Renderer

    if spec.sources:
        parts = [foresee(s, f"{where}.sources[{i}]", tokenizer) for i, s in enumerate(spec.parts())]
        told = tuple(note for _, notes in parts for note in notes)
        return [fault for faults, _ in parts for fault in faults], (*told, f"{where}: {_shares(spec)}")
    try:
        corpus = open_corpus(spec)
        if corpus.source.kind != "files" or not corpus.is_dialogue:
            return [], ()
        renderer = Renderer(tokenizer())
        renderer([one for one in islice(corpus.documents("all"), LOOKED_AT) if isinstance(one, Dialogue)])
    except InputError as error:
        found = [fault for fault in error.faults if isinstance(fault, Fault)]
        return [Fault(f"{where}: {f.where}", f.expected, f.got, f.cure) for f in found], ()
    how = (
        "the tokenizer's own chat template"
        if renderer.template
        else "plain 'User:' and 'Assistant:' headings"
    )
    what = "all tokens" if spec.supervise == "all" else "the responses"
    return [], (f"{where}: dialogues, worded with {how}; training learns {what}",)


def _shares(spec: DataSpec) -> str:
    """What an epoch of several sources is; how often each is seen, where the sizes of files tell."""
    sizes = [sum(path.stat().st_size for path in part.files) for part in open_corpus(spec).parts]
    said = []
    for one, share, size in zip(spec.sources, spec.shares, sizes, strict=True):
        often = f", by the bytes of files {share * sum(sizes) / size:.2g} times over" if all(sizes) else ""
        said.append(f"{one.source} {share:.1%} of them{often}")
    return f"an epoch has as many rows as all sources together: {'; '.join(said)}"
