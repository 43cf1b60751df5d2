"""Examples as rows of tokens, one a row, for models that read a text whole; and batches of them.

Shapes: B = rows of a batch, T = tokens of a row, L = tokens of a batch's longest row, N = tokens of the
split, R = rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from compresskit.data.cache import Entry, Piece, build_entry, key_of
from compresskit.data.corpus import open_corpus
from compresskit.data.example import UNLABELLED, Example
from compresskit.data.lines import bad
from compresskit.data.pack import flat, in_batches, tokenizer_identity
from compresskit.data.spec import DataSpec

VERSION = "1"


class ExampleRows(Dataset[dict[str, Tensor | int]]):
    """A map-style data set of single examples over a memory-mapped token cache; nothing is padded.

    Item: ``{"input_ids": int64 (T,), "token_type_ids": int64 (T,), "label": int}``, the segments only where
    the tokenizer makes them; the label is -100 where the example has none.

    Attributes:
        lengths: tokens of each row (R,), int64.
        num_tokens: of all rows.
        num_labels: one more than the highest class in the source; 0 where it has none.
        pad_id: what :func:`pad_stack` fills up with.
        warnings: sentences about the source, for the stage's result.
    """

    def __init__(self, entry: Entry, *, rows: int | None = None, pad_id: int = 0) -> None:
        self.warnings = entry.notes
        self.pad_id = pad_id
        whole = len(entry.starts)
        count = whole if rows is None else min(rows, whole)
        # A part of the rows is spread over the whole split: the first rows are the first files' only.
        kept = np.arange(count, dtype=np.int64) * whole // count
        ends = np.append(entry.starts[1:], len(entry.tokens))
        self._firsts: npt.NDArray[np.int64] = entry.starts[kept]
        self.lengths: npt.NDArray[np.int64] = ends[kept] - self._firsts
        self.num_tokens = int(self.lengths.sum())
        self._tokens, self._types = entry.tokens, entry.types
        self._labels = None if entry.labels is None else entry.labels[kept]
        self.num_labels = 0 if entry.labels is None else max(int(entry.labels.max()) + 1, 0)

    def __len__(self) -> int:
        return len(self._firsts)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = int(self._firsts[index])
        part = slice(first, first + int(self.lengths[index]))
        row: dict[str, Tensor | int] = {"input_ids": torch.from_numpy(self._tokens[part].astype(np.int64))}
        if self._types is not None:
            row["token_type_ids"] = torch.from_numpy(self._types[part].astype(np.int64))
        row["label"] = UNLABELLED if self._labels is None else int(self._labels[index])
        return row


def pad_stack(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right to the longest.

    Args:
        rows: of ``{"input_ids", "token_type_ids"?, "label"?}``, at least one, all with the same keys.
        pad_id: what ids are padded with; no model looks there, but some count their positions by it.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on a row's own tokens), and where the rows have them
        ``token_type_ids`` (padded with 0), int64 (B, L) each, and ``labels``, int64 (B,).
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": _padded(ids, pad_id),
        "attention_mask": _padded([torch.ones_like(one) for one in ids], 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = _padded([torch.as_tensor(row["token_type_ids"]) for row in rows], 0)
    if "label" in rows[0]:
        batch["labels"] = torch.tensor([int(row["label"]) for row in rows], dtype=torch.int64)
    return batch


def _padded(parts: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=float(value))


def examples(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    context_length: int,
    cache: Path,
    rows: int | None = None,
) -> ExampleRows:
    """The examples of a split, each as the tokenizer words it, with its own special tokens.

    An example longer than ``context_length`` is cut by the tokenizer: of a pair the longer side first.

    Args:
        spec: where the examples come from; read as such whether or not ``spec.examples`` says so.
        tokenizer: of the model that will read the rows.
        split: ``train``, ``validation`` or ``all``.
        context_length: most tokens of a row.
        cache: folder of the token cache; the entry is shared by all ``rows``.
        rows: at most so many rows, spread evenly over the split; None takes all.

    Raises:
        DataError: the source cannot be read or the split holds no example, or ``context_length`` has no room
            for the special tokens and a token of each side.
    """
    spec = replace(spec, examples=True)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if context_length < least:
        cure = "Raise the context length."
        raise bad("context_length", f"at least {least} tokens for a pair", str(context_length), cure)
    corpus = open_corpus(spec)
    size: Any = len(tokenizer)
    dtype = "<u2" if size <= 1 << 16 else "<u4"
    worded = [repr(sorted(tokenizer(*texts, verbose=False).items())) for texts in (("a b",), ("a b", "c"))]
    key = key_of(
        *("examples", VERSION, corpus.fingerprint(), split, dtype, str(context_length)),
        *(tokenizer_identity(tokenizer), tokenizer.truncation_side, *worded),
    )
    notes: list[str] = []  # filled while the examples are read
    batches = _pieces(corpus.examples(split, notes), tokenizer, context_length, spec.source, notes)
    entry = build_entry(cache, key, flat(batches, spec.source, split), dtype=dtype, notes=notes)
    pad: Any = tokenizer.pad_token_id
    return ExampleRows(entry, rows=rows, pad_id=0 if pad is None else int(pad))


def _pieces(
    contents: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    source: str,
    notes: list[str],
) -> Iterator[list[Piece]]:
    """The tokens, segments and classes of examples, a batch at a time; ``notes`` at the end."""
    seen = unlabelled = long = empty = joined = 0
    for batch in in_batches(contents):
        coded = _coded(batch, tokenizer)
        over = [i for i, ids in enumerate(coded["input_ids"]) if len(ids) > context_length]
        if over:
            cut = _coded([batch[i] for i in over], tokenizer, truncation=True, max_length=context_length)
            for name in coded:
                for place, i in enumerate(over):
                    coded[name][i] = cut[name][place]
        types = coded.get("token_type_ids") or [None] * len(batch)
        pieces = []
        for one, ids, segments in zip(batch, coded["input_ids"], types, strict=True):
            if not ids:
                empty += 1
                continue
            pieces.append(Piece(ids, None, segments, UNLABELLED if one.label is None else one.label))
        seen, long = seen + len(batch), long + len(over)
        unlabelled += sum(one.label is None for one in batch)
        joined += sum(one.pair is not None for one in batch)
        yield pieces
    if long:
        notes.append(
            f"{source}: {long} of {seen} examples are longer than the context of {context_length} tokens "
            "and were cut."
        )
    if 0 < unlabelled < seen:
        notes.append(f"{source}: {unlabelled} of {seen} examples have no class.")
    if empty:
        notes.append(f"{source}: {empty} of {seen} examples have no token and were left out.")
    if joined and not tokenizer.num_special_tokens_to_add(pair=True):
        notes.append(f"{source}: the tokenizer puts nothing between the two sentences of a pair.")


def _coded(batch: list[Example], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, list[Any]]:
    """Ids, and segments where the tokenizer makes them, of each example in order.

    Single sentences and pairs are told apart, for a source may hold both.
    """
    made: dict[str, list[Any]] = {}
    for paired in (False, True):
        places = [i for i, one in enumerate(batch) if (one.pair is not None) == paired]
        if not places:
            continue
        texts = [[batch[i].text for i in places]]
        texts += [[batch[i].pair or "" for i in places]] if paired else []
        coded = tokenizer(*texts, verbose=False, return_attention_mask=False, **options)
        for name in ("input_ids", "token_type_ids"):
            if name in coded:
                column = made.setdefault(name, [None] * len(batch))
                for i, value in zip(places, coded[name], strict=True):
                    column[i] = value
    return made
