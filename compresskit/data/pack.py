"""Documents packed into rows of equal length, without letting them see each other.

Shapes: T = context_length, N = tokens of the split, D = documents of the split.

A row holds T consecutive tokens of the split, whatever documents they belong to.
``position_ids`` restart at 0 with each document (and with each row): transformers sees the
jump and keeps attention inside documents, as long as the model is called with
``attention_mask=None`` and ``use_cache=False``. Rows of any batch size are handled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from compresskit.data.cache import Entry, build_entry, key_of
from compresskit.data.corpus import open_corpus
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError, Fault
from compresskit.progress import Progress

BATCH_CHARACTERS = 1 << 20
UNSUPERVISED = -100


class PackedRows(Dataset[dict[str, Tensor]]):
    """A map-style data set of packed rows over a memory-mapped token cache.

    Item: ``{"input_ids", "labels", "position_ids"}``, each int64 (T,). Labels are not shifted
    (transformers shifts them); -100 marks a document's first token and a row's first token,
    which nothing before them could predict.

    Attributes:
        context_length: T; the only row of a split shorter than T is as long as the split.
        num_tokens: N.
        num_documents: D.
        warnings: sentences about the source, for the stage's result.
    """

    def __init__(
        self, entry: Entry, context_length: int, *, rows: int | None = None, cross_documents: bool = False
    ) -> None:
        self.context_length = context_length
        self.cross_documents = cross_documents
        self.num_tokens = len(entry.tokens)
        self.num_documents = len(entry.starts)
        self.warnings = entry.notes
        self._tokens, self._starts = entry.tokens, entry.starts
        whole = max(1, self.num_tokens // context_length)
        count = whole if rows is None else min(rows, whole)
        # A part of the rows is spread over the whole split: the first rows are the first files' only.
        self._rows = np.arange(count, dtype=np.int64) * whole // count

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin = int(self._rows[index]) * self.context_length
        ids = self._tokens[begin : begin + self.context_length].astype(np.int64)
        first, last = np.searchsorted(self._starts, [begin, begin + len(ids)])
        starts = np.unique(np.concatenate(([0], self._starts[first:last] - begin)))
        labels = ids.copy()
        labels[starts] = UNSUPERVISED
        positions = np.arange(len(ids), dtype=np.int64)
        if not self.cross_documents:
            positions -= np.repeat(starts, np.diff(starts, append=len(ids)))
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }


def _closing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What goes after each document so that its end can be seen: EOS, where the tokenizer adds neither."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and ids[:1] == [bos]
    ends = eos is not None and ids[-1:] == [eos]
    return [] if eos is None or starts or ends else [int(eos)]


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything about ``tokenizer`` that decides token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = [type(tokenizer).__name__, body, repr(tokenizer("a b", verbose=False)["input_ids"])]
    return hashlib.sha256("\0".join([*facts, repr(_closing(tokenizer))]).encode()).hexdigest()


def _token_lists(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, source: str, split: str
) -> Iterator[list[int]]:
    """The token ids of each text; a split without any is an error, so no empty entry is ever cached."""
    closing = _closing(tokenizer)
    tokens = 0
    with Progress(f"tokenising {source} ({split})", 0, unit="documents") as progress:
        for batch in _batches(texts):
            lists: list[list[int]] = tokenizer(batch, verbose=False)["input_ids"]
            for ids in lists:
                tokens += len(ids)
                yield ids + closing
            progress.total = progress.done + len(batch)  # a stream's length is not known before its end
            progress.advance(len(batch))
    if not tokens:
        where, cure = f"{source} ({split})", "Give more documents, or change validation_fraction."
        raise DataError(Fault(where, "at least one document with text", "none", cure))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def packed(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    context_length: int,
    cache: Path,
    rows: int | None = None,
) -> PackedRows:
    """The documents of a split as packed rows.

    Special tokens are the tokenizer's own; if it adds neither BOS nor EOS but has an EOS, that
    goes after each document. The last, partial row is left out unless it is the only one.

    Args:
        spec: where the text comes from.
        tokenizer: of the model that will read the rows.
        split: ``train``, ``validation`` or ``all``.
        context_length: T, tokens per row.
        cache: folder of the token cache; the entry is shared by all ``context_length`` and ``rows``.
        rows: at most so many rows, spread evenly over the split; None takes all.

    Raises:
        DataError: the source cannot be read, or the split holds no text.
    """
    if context_length < 2:
        got = str(context_length)
        raise DataError(Fault("context_length", "at least 2 tokens", got, "Raise the context length."))
    corpus = open_corpus(spec)
    size: Any = len(tokenizer)
    dtype = "<u2" if size <= 1 << 16 else "<u4"
    key = key_of(corpus.fingerprint(), split, _identity(tokenizer), dtype)
    notes: list[str] = []  # filled while the documents are read
    pieces = _token_lists(corpus.documents(split, notes), tokenizer, spec.source, split)
    entry = build_entry(cache, key, pieces, dtype=dtype, notes=notes)
    return PackedRows(entry, context_length, rows=rows, cross_documents=spec.cross_documents)
