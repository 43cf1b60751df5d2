"""A Llama with random weights, a tokenizer that needs no network, and text to calibrate it on.

    python -m benchmarks.run random_llama DIR

About 110 million parameters as it stands: width 768, 12 layers, 12 heads, 32,000 tokens, bfloat16. A token
is a word: ``w17`` is token 17, so that any sequence of token ids can be written down as text, and any two
programs that are to be compared read the very same tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

VOCABULARY = 32_000
MODEL, TEXT = "model", "rows.jsonl"


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word ``w<i>``; no BOS, no EOS; whatever is no such word is token 0."""
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def write_model(directory: Path, *, vocabulary: int, width: int, layers: int, heads: int, seed: int) -> int:
    """Write the model and its tokenizer, and return the number of parameters.

    Weights are drawn as transformers draws them, normal with standard deviation 0.02; embeddings are tied.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 128) * 128,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    word_tokenizer(vocabulary).save_pretrained(directory)
    return int(model.num_parameters())


def write_text(path: Path, *, rows: int, context_length: int, vocabulary: int, seed: int) -> None:
    """Write random words, a document for each row; common words are as much more common as in real text.

    There is a document more than there are rows: the second one of any source is held out of calibration.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_V = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.multinomial(weight_V, (rows + 1) * context_length, replacement=True, generator=generator)
    texts = (" ".join(f"w{i}" for i in row) for row in ids.reshape(rows + 1, -1).tolist())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_random_llama(
    directory: Path,
    *,
    rows: int,
    context_length: int,
    vocabulary: int = VOCABULARY,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
    seed: int = 0,
) -> int:
    """Write ``directory/model`` and ``directory/rows.jsonl``; the same arguments give the same bytes.

    Returns:
        The number of parameters.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_text(
        directory / TEXT, rows=rows, context_length=context_length, vocabulary=vocabulary, seed=seed + 1
    )
    return write_model(
        directory / MODEL, vocabulary=vocabulary, width=width, layers=layers, heads=heads, seed=seed
    )


def main() -> None:
    """Write one into a directory."""
    parser = argparse.ArgumentParser(description="A random Llama of 110 million parameters.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = write_random_llama(
        options.directory, rows=options.rows, context_length=options.context_length, seed=options.seed
    )
    print(f"{options.directory / MODEL}: {count:,} parameters")


if __name__ == "__main__":
    main()
