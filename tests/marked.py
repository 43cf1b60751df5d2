"""A model with a tokenizer like sentencepiece's, unlike the byte tokenizer of ``tiny``."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PIECES = [
    "\u2581",
    "a",
    "b",
    "c",
    "n",
    "d",
    "\u2581a",
    "an",
    "\u2581an",
    "nd",
    "\u2581and",
    "ca",
    "\u2581ca",
    "ba",
    *("\u2581b", "\u2581c", "\u2581d", "\u2581n"),  # no merge makes these
]
MERGES = ["\u2581 a", "a n", "\u2581a n", "n d", "\u2581an d", "c a", "\u2581 ca", "b a"]


def marked_tokenizer() -> PreTrainedTokenizerFast:
    """As sentencepiece's: a space before the text, marks for spaces, bytes for what has no token, and BOS."""
    ids = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    ids |= {piece: 259 + i for i, piece in enumerate(PIECES)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def trailing_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with the space after a word: ``and_``, ``a_``."""
    ids = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("a", "\u0120"), ("n", "d"), ("nd", "\u0120"), ("a", "nd\u0120"), ("c", "a")]
    ids |= {"".join(merge): len(ids) + i for i, merge in enumerate(merges)}
    ids |= {"<s>": len(ids), "</s>": len(ids) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_marked(directory: Path) -> Path:
    """A model in double precision that has this tokenizer."""
    tokenizer = marked_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 5,  # rows that stand for nothing
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).double().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
