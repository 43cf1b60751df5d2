"""A tiny untrained Llama with a byte-level tokenizer, saved as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight[::2] = 0
            # Away from uniform predictions, so that a wrong position shows.
            block.self_attn.q_proj.weight *= 8
        model.model.embed_tokens.weight *= 40
    place = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(place)
    byte_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    place = tmp_path_factory.mktemp("models") / "tiny-bert"
    BertModel(config).save_pretrained(place)
    byte_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(place)
    return place
