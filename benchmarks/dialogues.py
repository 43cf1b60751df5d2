"""Dialogues, loss on responses only, bytes as tokens: a live teacher and caches of it, step by step.

    python -m benchmarks.run dialogues --data FILE

A small Llama of bytes learns the dialogues from their text alone, and then teaches a smaller one by forward
KL: live, from a cache of hidden states, and from a cache of its likeliest ids; the same student, rows and
order each time. ``curve_relative`` is the largest relative difference of a step's loss from that beside the
live teacher. Of ids that a cache left out only the sum is known, so its loss is lower than the whole one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import compresskit as ck
from benchmarks.run import RESULTS, append_record
from compresskit.data.pack import UNSUPERVISED, packed

LIVE = "live"
SHAPES = {"student": (64, 2), "teacher": (128, 3)}
"""Hidden width and blocks; a head has 32 channels."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and BOS and EOS."""
    ids = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ids |= {"<s>": len(ids), "</s>": len(ids) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_model(directory: Path, width: int, blocks: int, context_length: int) -> int:
    """A Llama of bytes with random weights; returns its number of parameters."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(width)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return int(model.num_parameters())


def rows_of(data: ck.DataSpec, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """What is learnt of each split."""
    found: dict[str, Any] = {}
    for split in ("train", "validation"):
        rows = packed(data, byte_tokenizer(), split=split, context_length=options.context_length, cache=place)
        learnt = [int((rows[i]["labels"] != UNSUPERVISED).sum()) for i in range(len(rows))]
        found[split] = {
            "rows": len(rows),
            "rows_without_supervised_tokens": learnt.count(0),
            "tokens": len(rows) * options.context_length,
            "supervised_tokens": sum(learnt),
            "notes": [note.replace(data.source, Path(data.source).name) for note in rows.warnings],
        }
    return found


def taught(recipe: ck.Recipe, out: Path) -> dict[str, Any]:
    """Losses of every step, and what the last stage's manifest says."""
    artifact = ck.run(recipe, out, measures=())
    (log,) = out.rglob("*losses.jsonl")
    losses = [record["loss"] for line in log.open() if "loss" in (record := json.loads(line))]
    metrics = artifact.manifest["stages"][-1]["result"]["metrics"]
    kept = ("validation_loss_before", "validation_loss", "final_loss", "final_parts", "teacher")
    return {"losses": losses} | {name: metrics[name] for name in kept if name in metrics}


def compared(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of the record's values."""
    data = ck.DataSpec(source=str(options.data), documents=options.documents)
    values: dict[str, Any] = {"data": rows_of(data, options, place / "cache" / "tokens")}
    for name, shape in SHAPES.items():
        values[f"{name}_parameters"] = write_model(place / name, *shape, options.context_length)
    shared = {name: getattr(options, name) for name in ("batch_size", "context_length")}
    shared |= {"checkpoint_every": 0}
    text = ck.Finetune(steps=options.teacher_steps, learning_rate=options.teacher_rate, **shared)
    made = taught(ck.Recipe(model=str(place / "teacher"), data=data, stages=(text,)), place / "taught")
    values["teacher_text_loss"] = {name: made[name] for name in ("final_loss", "validation_loss")}
    placements: dict[str, Any] = {
        LIVE: "replicate",
        "hidden": {"method": "cache", "keep": "hidden"},
        "hidden_unrounded": {"method": "cache", "keep": "hidden", "precision": "model"},
        "top_k": {"method": "cache", "keep": "top_k", "k": options.k},
    }
    for name, placement in placements.items():
        stage = ck.Distill(
            teacher=str(place / "taught"),
            teacher_placement=placement,
            loss="forward_kl",
            steps=options.steps,
            learning_rate=options.learning_rate,
            **shared,
        )
        recipe = ck.Recipe(model=str(place / "student"), data=data, stages=(stage,), seed=options.seed)
        found = taught(recipe, place / name)
        true = values[LIVE]["losses"] if values.get(LIVE) else found["losses"]
        pairs = list(zip(found["losses"], true, strict=True))
        found["curve_relative"] = max(abs(a / b - 1) for a, b in pairs)
        found["equal_steps"] = sum(a == b for a, b in pairs)
        values[name] = found
        print(name, {k: v for k, v in found.items() if k != "losses"}, flush=True)
    return values


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Dialogues beside a live teacher and caches of it.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--teacher-steps", type=int, default=120)
    parser.add_argument("--teacher-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Run it and append a record."""
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["COMPRESSKIT_CACHE"] = str(Path(scratch) / "cache")
        values = compared(Path(scratch), options)
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "results")}
    print(
        append_record(
            "dialogues",
            values,
            subject=options.data.name,
            results=options.results,
            settings=settings,
        )
    )


if __name__ == "__main__":
    main()
