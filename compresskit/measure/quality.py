"""How well a causal language model predicts text: perplexity and bits per byte.

Protocol: each document is [start] + its tokens, truncated to the context; every token after the start is
scored, natural logarithm, and one mean is taken over all tokens of all documents. The start is the
tokenizer's BOS, else its EOS, else nothing, in which case a document's first token is not scored.
Perplexities of different tokenizers do not compare; bits per byte do.

Of a dialogue, worded as :mod:`compresskit.data.render` says, the tokens of the responses and what ends them
are scored, and ``bytes`` are those of the responses. One longer than the context is cut as for training
(:func:`compresskit.data.pack.cut`).

Shapes: B = documents of a batch, T = tokens, V = vocabulary, C = tokens of one slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from compresskit.data.dialogue import Content, Dialogue
from compresskit.data.pack import cut
from compresskit.data.render import Renderer
from compresskit.errors import DataError, Fault, InputError, NumericError
from compresskit.progress import Progress

MAX_LOGITS_BYTES = 128 * 2**20  # of the largest (B, T, V) tensor, counted as float32
MAX_BATCH_TOKENS = 8192
SCORE_ROWS = 1024  # (token, vocabulary) rows turned into float32 at a time

Overflow = Literal["truncate", "window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What :func:`quality` found.

    Attributes:
        tokens: scored.
        nats_per_token: mean negative log-likelihood, natural logarithm.
        perplexity: exp(nats_per_token).
        bits_per_byte: total bits over ``bytes``.
        bytes: of UTF-8 text that the scored tokens cover.
        documents: scored.
        cut_documents: of those, longer than the context: truncated, or scored in windows.
        start: what each document began with: ``bos``, ``eos``, ``nothing``, or ``its wording`` for dialogues.
        scored: ``all tokens`` or ``responses``.
    """

    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    bytes: int
    documents: int
    cut_documents: int
    start: str
    scored: str = "all tokens"


@dataclass(frozen=True, slots=True)
class Piece:
    """One forward pass's worth of a document: ``ids``, of which those in ``runs`` are scored."""

    document: int
    ids: Sequence[int]
    runs: Sequence[tuple[int, int]]

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(end - first for first, end in self.runs)


def quality(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Content],
    *,
    context_length: int,
    max_documents: int | None = None,
    overflow: Overflow = "truncate",
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> Quality:
    """Score ``documents`` with ``model``; the protocol is this module's docstring.

    Documents of like length share a batch, padded on the right, which a causal model cannot see. The tensor
    of logits is kept under ``max_logits_bytes``: longer documents run slice by slice through the model's
    own key-value cache, which is the same arithmetic.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        documents: texts, or dialogues; the first one says which.
        context_length: tokens the model sees at once, the start token among them.
        max_documents: score the first so many; None scores all.
        overflow: what becomes of a longer document: ``truncate`` drops the rest; ``window`` scores every
            byte, each token with at least half a context before it.
        max_logits_bytes: bound of the largest (B, T, V) tensor, counted in float32.

    Returns:
        The figures, nats and bits over all documents.

    Raises:
        InputError: ``context_length`` is too small, or the tokenizer cannot tell which bytes a token covers.
        DataError: there is nothing to score.
        NumericError: the model returned NaN or infinite logits.
    """
    if context_length < 2:
        raise InputError(Fault("context_length", "at least 2", str(context_length), "Raise context_length."))
    start, start_name = _start(tokenizer)
    pieces: list[Piece] = []
    texts_bytes = num_documents = num_cut = 0
    render: Renderer | None = None
    for number, content in enumerate(islice(documents, max_documents)):
        if isinstance(content, Dialogue):
            if overflow == "window":
                got = "dialogues"
                raise InputError(Fault("overflow='window'", "texts", got, "Score them with 'truncate'."))
            render = render or Renderer(tokenizer)
            made, is_cut, covered = _dialogue_pieces(render, content, number, context_length)
        else:
            made, is_cut, covered = _pieces(tokenizer, content, number, start, context_length, overflow)
        pieces += made
        texts_bytes += covered
        num_documents += bool(made)
        num_cut += is_cut
    if not pieces:
        raise DataError(
            Fault("evaluation data", "at least one token to score", "none", "Give documents with text.")
        )
    nats, tokens = _score_all(model, pieces, max_logits_bytes)
    return Quality(
        tokens=tokens,
        nats_per_token=nats / tokens,
        perplexity=math.exp(min(nats / tokens, 700.0)),
        bits_per_byte=nats / math.log(2) / texts_bytes,
        bytes=texts_bytes,
        documents=num_documents,
        cut_documents=num_cut,
        start="its wording" if render else start_name,
        scored="responses" if render else "all tokens",
    )


def _start(tokenizer: Any) -> tuple[list[int], str]:
    """The token every document begins with, and its name."""
    for name in ("bos", "eos"):
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            return [token], name
    return [], "nothing"


def _pieces(
    tokenizer: Any, text: str, number: int, start: list[int], context_length: int, overflow: Overflow
) -> tuple[list[Piece], bool, int]:
    """Document ``number`` as forward passes, whether it was cut, and the bytes its scored tokens cover."""
    # A text longer than the context is expected here: verbose=False silences the tokenizer's warning.
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False
    )
    ids, offsets = start + encoded["input_ids"], encoded.get("offset_mapping")
    if len(ids) < 2:
        return [], False, 0
    is_cut = len(ids) > context_length
    if overflow == "window":
        pieces, last = list(_windows(ids, number, context_length)), len(ids)
    else:
        last = min(len(ids), context_length)
        pieces = [Piece(number, ids[:last], [(1, last)])]
    if offsets is None and (last < len(ids) or not start):
        raise InputError(
            Fault(
                "tokenizer",
                "a fast tokenizer, which knows the bytes of each token",
                type(tokenizer).__name__,
                "Use overflow='window' and a tokenizer with a BOS token, or save a fast tokenizer.",
            )
        )
    begin = 0 if start else offsets[0][1]
    end = len(text) if last == len(ids) else offsets[last - 1 - len(start)][1]
    return pieces, is_cut, len(text[begin:end].encode("utf-8", errors="surrogatepass"))


def _dialogue_pieces(
    render: Renderer, dialogue: Dialogue, number: int, context_length: int
) -> tuple[list[Piece], bool, int]:
    """As :func:`_pieces`, for a dialogue."""
    (made,) = render([dialogue])
    length, begin = len(made.ids), 0
    if length > context_length and made.learnt:
        begin = cut(length, made.learnt[-1][0], context_length)
    end = min(begin + context_length, length)
    # Nothing predicts a piece's first token.
    runs = [(max(first, begin + 1) - begin, min(last, end) - begin) for first, last in made.learnt]
    runs = [(first, last) for first, last in runs if first < last]
    pieces = [Piece(number, made.ids[begin:end], runs)] if runs else []
    return pieces, length > context_length, made.covered_bytes(begin + 1, end)


def _windows(ids: Sequence[int], number: int, context_length: int) -> Iterator[Piece]:
    """Overlapping windows over ``ids``; each token but the first is scored exactly once."""
    yield Piece(number, ids[:context_length], [(1, min(len(ids), context_length))])
    done = context_length
    stride = max(context_length // 2, 1)
    while done < len(ids):
        end = min(done + stride, len(ids))
        begin = end - context_length
        yield Piece(number, ids[begin:end], [(done - begin, end - begin)])
        done = end


def _score_all(model: Any, pieces: list[Piece], max_logits_bytes: int) -> tuple[float, int]:
    """Total nats and number of tokens of ``pieces``; the sum does not depend on the batching's order."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    max_tokens = max(1, min(max_logits_bytes // (4 * vocabulary), MAX_BATCH_TOKENS))
    by_length = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
    nats = [0.0] * len(pieces)
    total = sum(p.scored for p in pieces)
    with Progress("quality", total, unit="tokens") as progress, torch.inference_mode():
        for batch in _batches(by_length, pieces, max_tokens):
            chosen = [pieces[i] for i in batch]
            for i, value in zip(batch, _score(model, chosen, max_tokens), strict=True):
                nats[i] = value
            progress.advance(sum(p.scored for p in chosen))
    for piece, value in zip(pieces, nats, strict=True):
        if not math.isfinite(value):
            raise NumericError(
                Fault(
                    f"document {piece.document} of the evaluation data",
                    "a finite log-likelihood",
                    str(value),
                    "The model's weights or its dtype overflow; compare with the model before compression.",
                )
            )
    return math.fsum(nats), total


def _batches(order: Sequence[int], pieces: Sequence[Piece], max_tokens: int) -> Iterator[list[int]]:
    """Runs of ``order`` (longest first) whose padded size stays within ``max_tokens``; one piece at least."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(pieces[batch[0]].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(model: Any, batch: Sequence[Piece], max_tokens: int) -> list[float]:
    """Nats of each piece of one batch."""
    # The last token of a piece is only ever a label.
    length = len(batch[0].ids) - 1
    ids_BT = torch.zeros(len(batch), length + 1, dtype=torch.int64)
    scored_BT = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, piece in enumerate(batch):
        ids_BT[row, : len(piece.ids)] = torch.tensor(piece.ids)
        for first, end in piece.runs:
            scored_BT[row, first - 1 : end - 1] = True
    ids_BT = ids_BT.to(model.device)
    scored_BT = scored_BT.to(model.device)
    nats_B = torch.zeros(len(batch), dtype=torch.float64, device=model.device)
    step = max(1, max_tokens // len(batch))
    cache = None
    for begin in range(0, length, step):
        end = min(begin + step, length)
        # Right padding needs no attention mask: a causal model's real tokens come before it.
        out = model(input_ids=ids_BT[:, begin:end], past_key_values=cache, use_cache=step < length)
        cache = out.past_key_values if step < length else None
        nats_B += _nats(out.logits, ids_BT[:, begin + 1 : end + 1], scored_BT[:, begin:end])
    return [float(v) for v in nats_B]


def _nats(logits_BTV: Tensor, labels_BT: Tensor, scored_BT: Tensor) -> Tensor:
    """Sum over scored tokens of the negative log-likelihood, float64 (B,); float32 a slice at a time."""
    vocabulary = logits_BTV.shape[-1]
    logits_NV, labels_N = logits_BTV.reshape(-1, vocabulary), labels_BT.reshape(-1)
    nats_N = torch.empty(len(labels_N), dtype=torch.float64, device=logits_BTV.device)
    for begin in range(0, len(labels_N), SCORE_ROWS):
        rows = slice(begin, begin + SCORE_ROWS)
        logits_CV = logits_NV[rows].float()
        chosen_C = logits_CV.gather(1, labels_N[rows, None]).squeeze(1)
        nats_N[rows] = (logits_CV.logsumexp(1) - chosen_C).double()
    return nats_N.reshape(labels_BT.shape).where(scored_BT, 0.0).sum(1)
