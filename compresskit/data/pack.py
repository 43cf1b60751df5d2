"""Documents packed into rows of equal length, without letting them see each other.

Shapes: T = context_length, N = tokens of the split, D = documents of the split, R = rows, S = runs of learnt
tokens.

A row of text holds T consecutive tokens of the split, whatever documents they belong to. A row of dialogues
begins with a dialogue and holds as many whole ones as fit; what is left of it is filled with the first tokens
of the next, which are not learnt there. A dialogue longer than T has a row of its own (see :func:`cut`).
``position_ids`` restart at 0 with each document (and with each row): transformers sees the
jump and keeps attention inside documents, as long as the model is called with
``attention_mask=None`` and ``use_cache=False``. Rows of any batch size are handled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from compresskit.data.cache import Entry, Piece, build_entry, key_of
from compresskit.data.corpus import open_corpus
from compresskit.data.dialogue import Content, Dialogue
from compresskit.data.mixture import MixedRows, mixed
from compresskit.data.render import Renderer
from compresskit.data.spec import DataSpec
from compresskit.errors import DataError, Fault
from compresskit.progress import Progress

BATCH_CHARACTERS = 1 << 20
UNSUPERVISED = -100
LEAST_PROMPT = 8

T = TypeVar("T")


class PackedRows(Dataset[dict[str, Tensor]]):
    """A map-style data set of packed rows over a memory-mapped token cache.

    Item: ``{"input_ids", "labels", "position_ids"}``, each int64 (T,). Labels are not shifted
    (transformers shifts them); -100 marks what is not learnt: a document's first token and a row's first
    token, which nothing before them could predict, and of dialogues all but the assistant's tokens.
    Each row of dialogues has a label.

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
        self._tokens, self._starts, self._learnt = entry.tokens, entry.starts, entry.learnt
        # First token of each row, and the first and the end of those that may be learnt in it, (R, 3).
        if entry.learnt is None:
            firsts = np.arange(max(1, self.num_tokens // context_length), dtype=np.int64) * context_length
            windows = np.stack([firsts, firsts, firsts + context_length], axis=1)
            self.warnings += _idle(entry, firsts, min(context_length, self.num_tokens))
        else:
            windows, note = _dialogue_rows(entry, context_length)
            self.warnings += note
        whole = len(windows)
        count = whole if rows is None else min(rows, whole)
        # A part of the rows is spread over the whole split: the first rows are the first files' only.
        self._windows = windows[np.arange(count, dtype=np.int64) * whole // count]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        begin, low, high = map(int, self._windows[index])
        ids = self._tokens[begin : begin + self.context_length].astype(np.int64)
        first, last = np.searchsorted(self._starts, [begin, begin + len(ids)])
        starts = np.unique(np.concatenate(([0], self._starts[first:last] - begin)))
        labels = ids.copy()
        labels[~self._supervised(begin, len(ids), low, high)] = UNSUPERVISED
        labels[starts] = UNSUPERVISED
        positions = np.arange(len(ids), dtype=np.int64)
        if not self.cross_documents:
            positions -= np.repeat(starts, np.diff(starts, append=len(ids)))
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    def _supervised(self, begin: int, length: int, low: int, high: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` tokens from ``begin`` on are learnt: those in a run and in [low, high)."""
        if self._learnt is None:
            return np.ones(length, dtype=bool)
        keep = np.zeros(length, dtype=bool)
        first = np.searchsorted(self._learnt[:, 1], low, side="right")
        last = np.searchsorted(self._learnt[:, 0], high)
        for a, b in self._learnt[first:last].clip(low, high) - begin:
            keep[a:b] = True
        return keep


def _idle(entry: Entry, firsts: npt.NDArray[np.int64], length: int) -> tuple[str, ...]:
    """How many rows of text, beginning at ``firsts``, have no token to learn, if any."""
    begun = np.searchsorted(entry.starts, firsts + length) - np.searchsorted(entry.starts, firsts, "right")
    idle = int((begun == length - 1).sum())
    if not idle:
        return ()
    return (f"{idle} of {len(firsts)} rows have no token to learn: each token begins a document.",)


TokenRows = PackedRows | MixedRows


def cut(length: int, last_run: int, context_length: int) -> int:
    """Where the ``context_length`` tokens begin that are kept of a longer dialogue.

    It is cut on the left, through its earliest turns and the beginning of the last prompt, so that the whole
    last response is kept. Where this would leave less than an eighth of the context to the prompt, up to
    half of the context is prompt, and the response loses its end.

    Args:
        length: tokens of the dialogue, more than ``context_length``.
        last_run: where its last response begins.
        context_length: T, at least 2.
    """
    if length - last_run + max(1, context_length // LEAST_PROMPT) <= context_length:
        return length - context_length
    return max(0, last_run - context_length // 2)


def _dialogue_rows(entry: Entry, context_length: int) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """The rows (R, 3) that dialogues are packed into, and a sentence if some had to be cut."""
    assert entry.learnt is not None
    total, starts = len(entry.tokens), entry.starts
    ends = np.append(starts[1:], total)
    last_runs = entry.learnt[np.searchsorted(entry.learnt[:, 0], ends) - 1, 0]
    windows: list[tuple[int, int, int]] = []
    at = long = 0
    while at < len(starts):
        begin = int(starts[at])
        after = int(np.searchsorted(ends, begin + context_length, side="right"))
        if after > at:
            # The last row reaches back into dialogues before it, where nothing is learnt again.
            windows.append((max(0, min(begin, total - context_length)), begin, int(ends[after - 1])))
            at = after
        else:
            begin += cut(int(ends[at]) - begin, int(last_runs[at]) - begin, context_length)
            windows.append((begin, begin, begin + context_length))
            long += 1
            at += 1
    made = np.asarray(windows, dtype=np.int64)
    if not long:
        return made, ()
    kept = sum(_overlap(entry.learnt, low, high) for _, low, high in windows)
    tokens = int((entry.learnt[:, 1] - entry.learnt[:, 0]).sum())
    return made, (
        f"{long} of {len(starts)} dialogues are longer than the context of {context_length} tokens and were "
        f"cut; {kept} of {tokens} tokens to learn are left.",
    )


def _overlap(learnt: npt.NDArray[np.int64], low: int, high: int) -> int:
    """Learnt tokens in [low, high)."""
    first = np.searchsorted(learnt[:, 1], low, side="right")
    last = np.searchsorted(learnt[:, 0], high)
    part = learnt[first:last].clip(low, high)
    return int((part[:, 1] - part[:, 0]).sum())


def _closing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What goes after each document so that its end can be seen: EOS, where the tokenizer adds neither."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bos is not None and ids[:1] == [bos]
    ends = eos is not None and ids[-1:] == [eos]
    return [] if eos is None or starts or ends else [int(eos)]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything about ``tokenizer`` that decides token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    facts = [type(tokenizer).__name__, body, repr(tokenizer("a b", verbose=False)["input_ids"])]
    return hashlib.sha256("\0".join([*facts, repr(_closing(tokenizer))]).encode()).hexdigest()


def _pieces(
    texts: Iterable[Content], tokenizer: PreTrainedTokenizerBase, source: str, notes: list[str]
) -> Iterator[list[Piece]]:
    """The token ids of texts, a batch at a time; ``notes`` at the end."""
    closing = _closing(tokenizer)
    empty = 0
    for batch in in_batches(texts):
        lists: list[list[int]] = tokenizer([str(text) for text in batch], verbose=False)["input_ids"]
        empty += sum(not ids for ids in lists)
        yield [Piece(ids + closing) for ids in lists if ids]
    if empty:
        notes.append(f"{source}: {empty} documents have no token and were left out.")


def _dialogue_pieces(
    dialogues: Iterable[Content], renderer: Renderer, spec: DataSpec, notes: list[str]
) -> Iterator[list[Piece]]:
    """The token ids of dialogues and what of them is learnt, a batch at a time; ``notes`` at the end."""
    dropped = 0
    for batch in in_batches(dialogues):
        pieces = []
        for made in renderer([one for one in batch if isinstance(one, Dialogue)]):
            runs = [(0, len(made.ids))] if spec.supervise == "all" else made.learnt
            if any(end > max(first, 1) for first, end in runs):  # nothing predicts the first token
                pieces.append(Piece(made.ids, runs))
            else:
                dropped += 1
        yield pieces
    notes += renderer.notes(spec.source)
    if dropped:
        notes.append(f"{spec.source}: {dropped} dialogues have no token to learn and were left out.")


def flat(batches: Iterator[list[Piece]], source: str, split: str) -> Iterator[Piece]:
    """The pieces one by one; a split without any token is an error, so no empty entry is ever cached."""
    tokens = 0
    with Progress(f"tokenising {source} ({split})", 0, unit="documents") as progress:
        for batch in batches:
            tokens += sum(len(piece.ids) for piece in batch)
            yield from batch
            progress.total = progress.done + len(batch)  # a stream's length is not known before its end
            progress.advance(len(batch))
    if not tokens:
        where, cure = f"{source} ({split})", "Give more documents, or change validation_fraction."
        raise DataError(Fault(where, "at least one document with text", "none", cure))


def in_batches(contents: Iterable[T]) -> Iterator[list[T]]:
    """``contents`` in lists of about a million characters, as tokenizers like them."""
    batch: list[T] = []
    size = 0
    for content in contents:
        batch.append(content)
        size += len(str(content))
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
) -> TokenRows:
    """The documents of a split as packed rows, several sources mixed in their shares.

    Dialogues are worded as :mod:`compresskit.data.render` says. In text, special tokens are the tokenizer's
    own; if it adds neither BOS nor EOS but has an EOS, that goes after each document. The last, partial row
    of text is left out unless it is the only one.

    Args:
        spec: where the text or the dialogues come from.
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
    if not spec.sources:
        return _packed(spec, tokenizer, split, context_length, cache, rows)
    open_corpus(spec)  # tells what is wrong with the weights and with every name before any source is read
    parts = [_packed(part, tokenizer, split, context_length, cache) for part in spec.parts()]
    return mixed(parts, spec, rows)


def _packed(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    context_length: int,
    cache: Path,
    rows: int | None = None,
) -> PackedRows:
    """The rows of one source."""
    corpus = open_corpus(spec)
    size: Any = len(tokenizer)
    dtype = "<u2" if size <= 1 << 16 else "<u4"
    facts = [corpus.fingerprint(), split, tokenizer_identity(tokenizer), dtype]
    notes: list[str] = []  # filled while the documents are read
    contents = corpus.documents(split, notes)
    if corpus.is_dialogue:
        renderer = Renderer(tokenizer)
        facts.append(renderer.identity)
        batches = _dialogue_pieces(contents, renderer, spec, notes)
    else:
        batches = _pieces(contents, tokenizer, spec.source, notes)
    key = key_of(*facts)
    pieces = flat(batches, spec.source, split)
    entry = build_entry(cache, key, pieces, dtype=dtype, notes=notes)
    return PackedRows(entry, context_length, rows=rows, cross_documents=spec.cross_documents)
