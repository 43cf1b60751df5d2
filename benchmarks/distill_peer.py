"""Distillation side by side with TRL's GKD trainer and with a plain loop: tokens a second, and memory.

    python -m benchmarks.run distill_peer --peer-python PEER/bin/python --text FILE --tokenizer DIR

A random Llama of 20 million parameters learns from one of 60 million by forward KL, both with the vocabulary
of ``--tokenizer`` (GPT-2's has 50,257 tokens): batches of 4 rows of 512 tokens, fp32, AdamW, the same rows in
the same order on each side, which starts from the same weights: so the losses of the first steps are the
same, too. Fresh processes in turn, ``--rounds`` times over; the first two steps of each are not counted.
``peak_bytes`` is the kernel's high-water mark of a process's resident memory, imports included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.peers.call import HERE, run_jobs
from benchmarks.run import RESULTS, append_record
from compresskit.data.pack import packed
from compresskit.data.spec import DataSpec
from compresskit.measure.record import spread

OURS, PLAIN, PEER = "compresskit", "plain", "trl"
WARMUP = 2
SHAPES = {"student": (256, 9), "teacher": (512, 11)}
"""Hidden width and blocks; a head has 64 channels."""


def write_model(directory: Path, tokenizer: Any, width: int, blocks: int) -> int:
    """A Llama with random weights and tied embeddings; returns its number of parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 64) * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(width)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return int(model.num_parameters())


def prepared(place: Path, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, int]]:
    """The task, with its models and tokens written into ``place``; and the parameters of each model."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    task: dict[str, Any] = {"threads": options.threads, "ids": str(place / "ids.safetensors")}
    sizes = {}
    for name, shape in SHAPES.items():
        task[name] = str(place / name)
        sizes[name] = write_model(place / name, tokenizer, *shape)
    count = options.steps * options.batch_size
    spec = DataSpec(source=str(options.text), validation_fraction=0.0, cross_documents=True)
    rows = packed(spec, tokenizer, context_length=options.context_length, cache=place / "tokens", rows=count)
    if len(rows) < count:
        raise SystemExit(f"{options.text}: {len(rows)} rows, needed {count}: give more text or fewer steps")
    ids = torch.stack([rows[i]["input_ids"] for i in range(count)]).to(torch.int32)
    save_file({"input_ids": ids.view(options.steps, options.batch_size, -1)}, place / "ids.safetensors")
    return task, sizes


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """The sides that are there, each with its command."""
    found = {OURS: [sys.executable, str(HERE / "compresskit_distill.py")]}
    found[PLAIN] = [sys.executable, str(HERE / "plain_distill.py")]
    if options.peer_python:
        seen = subprocess.run([options.peer_python, "-c", "import trl"], capture_output=True, check=False)
        if seen.returncode:
            raise SystemExit(f"--peer-python {options.peer_python} has no trl: see peers/make_env.py trl DIR")
        found[PEER] = [options.peer_python, str(HERE / "trl_distill.py")]
    return found


def measured(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """What each round of each side came to, and facts of the whole."""
    runs: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        task, sizes = prepared(place, options)
        for _ in range(options.rounds):
            for side, command in commands(options).items():
                done = run_jobs(command, task, place)
                step_s = median(done.answer["seconds"][WARMUP:])
                found = {"tokens_per_s": options.batch_size * options.context_length / step_s}
                found |= {"peak_bytes": done.peak_bytes, "losses": done.answer["losses"]}
                runs.setdefault(side, []).append(found)
                prefix = "" if side == OURS else f"{side} "
                versions |= {f"{prefix}{name}": version for name, version in done.answer["versions"].items()}
                print(side, found, flush=True)
    return runs, {"versions": versions, "parameters": sizes}


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Distillation side by side with TRL's and a plain loop.")
    parser.add_argument("--peer-python", default="", help="of an environment with trl; else it is left out")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Measure in turn, print each run, and append a record."""
    options = parsed()
    runs, facts = measured(options)
    names = ("tokens_per_s", "peak_bytes")
    three = {
        f"{side}_{name}": spread([run[name] for run in rows]) for side, rows in runs.items() for name in names
    }
    values: dict[str, Any] = {name: middle for name, (_, middle, _) in three.items()}
    values |= {
        "parameters": facts["parameters"],
        "losses": {side: rows[0]["losses"] for side, rows in runs.items()},
    }
    for other in runs.keys() - {OURS}:
        for name in names:
            values[f"{name}_ratio_to_{other}"] = values[f"{OURS}_{name}"] / values[f"{other}_{name}"]
            print(f"{name}: {values[f'{name}_ratio_to_{other}']:.3f} of {other}'s")
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "context_length")}
    print(
        append_record(
            "distill-peer",
            values,
            subject="a random Llama of 20M parameters taught by one of 60M",
            results=options.results,
            quartiles=three,
            settings={**settings, "text": options.text.name, "tokenizer": options.tokenizer.name},
            threads=options.threads,
            repetitions=options.rounds,
            versions=facts["versions"],
        )
    )


if __name__ == "__main__":
    main()
