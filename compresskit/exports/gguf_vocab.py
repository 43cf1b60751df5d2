"""A Hugging Face tokenizer as GGUF holds it: SentencePiece-like with scores, or byte-level BPE with merges.

llama.cpp splits text by itself, so only what it splits in the same way is taken: a ``tokenizer.json`` whose
model is BPE, either with byte fallback and ``U+2581`` for spaces, or byte-level behind a pattern that
llama.cpp knows by name. SentencePiece-like text is merged there by the scores of the merged pieces, here by
the order of the merges: equal where each piece has one rank, which scores of minus the rank give.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.errors import Fault, FormatError
from compresskit.modeling import ModelSource, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "tokenizer.json"
SPACE = "\u2581"
UNRANKED = -1e9  # of a piece that no merge makes
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, str] = {
    "": "gpt-2",  # the pattern that ByteLevel has itself
    LLAMA3: "llama-bpe",
    LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llama.cpp is told.

    Attributes:
        model: ``llama`` (SentencePiece-like) or ``gpt2`` (byte-level).
        pre: how text is split before it is merged.
        tokens: by id.
        special: ids of tokens that control the model.
        added: ids of all tokens that were added to the vocabulary, the special ones among them.
        merges: pairs in order, as text.
        space_prefix: whether a space is put before the text.
    """

    model: str
    pre: str
    tokens: Mapping[int, str]
    special: frozenset[int]
    added: frozenset[int]
    merges: tuple[tuple[str, str], ...]
    space_prefix: bool


def vocabulary_faults(directory: Path, where: str) -> list[Fault]:
    """Why llama.cpp would split text in another way than the tokenizer in ``directory``."""
    try:
        read_vocabulary(directory, where)
    except FormatError as error:
        return [fault for fault in error.faults if isinstance(fault, Fault)]
    return []


def read_vocabulary(directory: Path, where: str) -> Vocabulary:
    """The vocabulary in ``directory``.

    Raises:
        FormatError: there is no tokenizer.json, or llama.cpp has no such tokenizer.
    """
    path = directory / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        model = data["model"]
        added = {int(t["id"]): t for t in data.get("added_tokens") or ()}
        kind = model.get("type", "BPE")
    except (OSError, ValueError, KeyError) as error:
        cure = "Load and save it once: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        raise FormatError(Fault(where, f"{path}", f"{type(error).__name__}", cure)) from error
    if kind != "BPE":
        raise _unknown(where, f"a {kind} tokenizer")
    tokens = {int(i): text for text, i in model["vocab"].items()}
    tokens |= {i: t["content"] for i, t in added.items()}
    name, pre, prefix = _splitting(data, where)
    return Vocabulary(
        model=name,
        pre=pre,
        tokens=tokens,
        special=frozenset(i for i, t in added.items() if t["special"]),
        added=frozenset(added),
        merges=tuple(_pairs(model["merges"])),
        space_prefix=prefix,
    )


def write_vocabulary(writer: GGUFWriter, model: ModelSource) -> None:
    """Tokens, their types and scores or merges, and which of them begin, end and fill."""
    found = read_vocabulary(model.directory, "export to gguf")
    size = model.config.vocab_size
    if max(found.tokens) >= size:
        got = f"token {max(found.tokens)}"
        cure = "Take the tokenizer that belongs to the model."
        raise FormatError(Fault(str(model.directory / FILE), f"ids below vocab_size {size}", got, cure))
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    # Rows of the embedding that no token has: llama.cpp counts rows, and wants a name for each.
    writer.add_token_list([found.tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(_types(found, size))
    if found.model == "llama":
        writer.add_token_scores(_scores(found, size))
        writer.add_add_space_prefix(found.space_prefix)
    else:
        # llama.cpp wants at least one; a pair that makes no token leaves the text in bytes.
        nothing = (found.tokens[max(found.tokens)],) * 2
        writer.add_token_merges([" ".join(pair) for pair in found.merges or (nothing,)])
    _write_special(writer, load_tokenizer(model))


def _splitting(data: Mapping[str, Any], where: str) -> tuple[str, str, bool]:
    """(model, pre, whether a space is put first) of a BPE tokenizer."""
    normalizers = list(_parts(data.get("normalizer"), "normalizers"))
    splitters = list(_parts(data.get("pre_tokenizer"), "pretokenizers"))
    kinds = [part["type"] for part in splitters]
    if kinds and kinds[-1] == "ByteLevel":
        patterns = [s["pattern"].get("Regex", "?") for s in splitters[:-1] if s["type"] == "Split"]
        own = splitters[-1].get("use_regex", True)
        pattern = "".join(patterns) if len(patterns) == len(splitters) - 1 else "?"
        plain = {n["type"] for n in normalizers} <= {"NFC"} and not splitters[-1].get("add_prefix_space")
        if not plain or pattern not in SPLITS or own != (pattern == ""):
            raise _unknown(where, f"a byte-level tokenizer that splits by {pattern or kinds}")
        return "gpt2", SPLITS[pattern], False
    if kinds == ["Metaspace"]:
        return "llama", "default", splitters[0].get("prepend_scheme", "always") != "never"
    spaces = [n for n in normalizers if n["type"] == "Replace" and n["content"] == SPACE]
    if kinds or not spaces or {n["type"] for n in normalizers} - {"Replace", "Prepend"}:
        raise _unknown(where, f"a tokenizer of {[n['type'] for n in normalizers] + kinds}")
    return "llama", "default", any(n["type"] == "Prepend" for n in normalizers)


def _parts(entry: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if entry is None:
        return
    yield from entry[name] if entry["type"] == "Sequence" else [entry]


def _pairs(merges: list[Any]) -> Iterator[tuple[str, str]]:
    """Merges in either of the forms that tokenizer.json has had."""
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _types(found: Vocabulary, size: int) -> list[int]:
    from gguf import TokenType

    kinds = []
    for i in range(size):
        text = found.tokens.get(i)
        kind = TokenType.NORMAL
        if text is None:
            kind = TokenType.UNUSED
        elif i in found.special:
            kind = TokenType.UNKNOWN if text == "<unk>" else TokenType.CONTROL
        elif i in found.added:
            kind = TokenType.USER_DEFINED
        elif found.model == "llama" and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kind = TokenType.BYTE
        kinds.append(int(kind))
    return kinds


def _scores(found: Vocabulary, size: int) -> list[float]:
    ranks: dict[str, float] = {}
    for rank, pair in enumerate(found.merges):
        ranks.setdefault("".join(pair), -float(rank))
    return [ranks.get(found.tokens.get(i, ""), UNRANKED) for i in range(size)]


def _write_special(writer: GGUFWriter, tokenizer: Any) -> None:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    some = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(some and some[0] == ids["bos"]))
    writer.add_add_eos_token(bool(len(some) > 1 and some[-1] == ids["eos"]))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _unknown(where: str, got: str) -> FormatError:
    expected = "a BPE tokenizer that llama.cpp has: SentencePiece-like, GPT-2's, Llama 3's or Qwen 2's"
    cure = "Export to dense, and convert that with llama.cpp's own script."
    return FormatError(Fault(where, expected, got, cure))
