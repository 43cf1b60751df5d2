"""How the bundled teacher is made: its tokenizer and its untrained network.

The teacher is a small Llama for Python source text. It makes a run without network
possible: every check of the whole chain has a real model to compress.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
VOCABULARY = 4096
CONTEXT = 512


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows every byte and puts BOS before each text.

    Args:
        texts: what the merges are learnt from.
        vocabulary: ids in all, BOS, EOS and the 256 bytes among them.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    add_special_tokens(core, end=False)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def add_special_tokens(core: Tokenizer, *, end: bool) -> None:
    """Make ``core`` put BOS before each text and, where ``end``, EOS after it.

    The rows of the training have the EOS, so that the model learns to stop; a prompt must not.
    """
    ids = [(token, core.token_to_id(token)) for token in (BOS, EOS)]
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if end else f"{BOS} $A", special_tokens=ids
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the teacher: 4.2 million parameters, of which a quarter is the tied embedding."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_teacher(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0) -> LlamaForCausalLM:
    """The untrained teacher in float32; the same ``seed`` gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(teacher_config(tokenizer))
