"""A real but tiny language model on disk, made in a moment, and what a plan knows of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compresskit.data.spec import DataSpec
from compresskit.modeling import ModelSource
from compresskit.stage import Outlook


def story(number: int) -> str:
    """A document that a tiny model can learn."""
    return f"The {number}th story is about the number {number * number}."


def stories(count: int = 200) -> str:
    """Text of so many documents."""
    return "\n\n".join(map(story, range(count)))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and BOS and EOS: 258 tokens, nothing unknown."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<s>": len(vocab), "</s>": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """A Llama of about 40,000 parameters with random weights, and the byte tokenizer beside it."""
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
    } | config
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def word_tokenizer(vocabulary: int = 64) -> PreTrainedTokenizerFast:
    """One token per word, ``w0`` and so on; a sentence between [CLS] and [SEP], a pair in two segments."""
    vocab = {name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    vocab |= {f"w{i}": i for i in range(len(vocab), vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_bert(directory: Path, *, seed: int = 0, classes: int = 0, **config: Any) -> Path:
    """A BERT of about 20,000 parameters with random weights, perhaps a classifier, and its tokenizer."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    } | config
    torch.manual_seed(seed)
    if classes:
        made = BertForSequenceClassification(BertConfig(**settings, num_labels=classes))
    else:
        made = BertModel(BertConfig(**settings))
    made.save_pretrained(directory)
    word_tokenizer(int(settings["vocab_size"])).save_pretrained(directory)
    return directory


def outlook(source: ModelSource, **changes: Any) -> Outlook:
    """What a plan knows of the model of ``source`` before any stage, but for ``changes``."""
    return replace(Outlook.of(source, data=DataSpec(), device="cpu"), **changes)
