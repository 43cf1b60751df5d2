"""A model larger than the memory it may take: a random 7B-shape Llama quantised in a process that is watched.

    python -m benchmarks.run large --method rtn --dir SCRATCH
    python -m benchmarks.run large --method gptq --dir SCRATCH --threads 2

The model (13.5 GB of bfloat16 shards) is made in SCRATCH, a tensor at a time, unless it is there from before;
a run needs as much again for the stage's checkpoint, and a third of it for the packed one. Counted is all of
``compresskit quantize``: plan, calibration, quantisation, checks of every promise, packing, reading back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.call import run_jobs
from benchmarks.random_llama import VOCABULARY, word_tokenizer, write_text
from benchmarks.run import RESULTS, append_record
from compresskit.formats.shards import Pending, write_shard

GIBIBYTE = 1 << 30
COUNTED = "peak_bytes: the high-water mark of the whole process; bare_bytes: the same after its imports."


def write_large(directory: Path, *, layers: int, width: int, inner: int, heads: int, seed: int) -> None:
    """Write a Llama in bfloat16, a shard for each block, never holding more than one tensor.

    Args:
        directory: left as it is if there is a whole model in it.
        layers: number of blocks.
        width: of the hidden states.
        inner: width inside the MLP.
        heads: of attention.
        seed: of the weights, normal with standard deviation 0.02.
    """
    if (directory / "config.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[Pending]] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        make = partial(_random, shape, generator)
        shards.setdefault(f"model-{block}.safetensors", []).append(Pending(name, torch.bfloat16, shape, make))
    for file, tensors in shards.items():
        write_shard(directory / file, tensors)
        print(f"{file}: {len(tensors)} tensors", flush=True)
    files = {pending.key: file for file, tensors in shards.items() for pending in tensors}
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    word_tokenizer(VOCABULARY).save_pretrained(directory)
    config.save_pretrained(directory)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight, or a norm's ones."""
    empty = torch.empty(shape, dtype=torch.bfloat16)
    return empty.fill_(1) if len(shape) == 1 else empty.normal_(0, 0.02, generator=generator)


def arguments() -> argparse.ArgumentParser:
    """The options of this benchmark."""
    parser = argparse.ArgumentParser(description="Quantise a random 7B-shape Llama; seconds and memory.")
    parser.add_argument("--dir", type=Path, required=True, help="a place of 35 GB for 32 layers")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main() -> None:
    """Make the model, quantise it in a fresh process, and append a record."""
    options = arguments().parse_args()
    model, out = options.dir / f"model-{options.layers}", options.dir / f"out-{options.method}"
    shape = {name: getattr(options, name) for name in ("layers", "width", "inner", "heads", "seed")}
    write_large(model, **shape)
    text = options.dir / "rows.jsonl"
    data = {"rows": options.rows, "context_length": options.context_length}
    write_text(text, vocabulary=VOCABULARY, seed=options.seed + 1, **data)
    fields = {"method": options.method, "scheme": options.scheme, "ignore": ["lm_head"]}
    job = {"name": "job", "stage": {"quantize": fields}}
    task = {"model": str(model), "data": str(text), "threads": options.threads, **data}
    command = [sys.executable, "-m", "benchmarks.peers.compresskit_jobs"]
    bare = run_jobs(command, {**task, "jobs": []}, options.dir)
    load = os.getloadavg()[0]
    done = run_jobs(command, {**task, "jobs": [{**job, "out": str(out)}]}, options.dir)
    if done.answer["errors"]:
        raise SystemExit(f"{options.method}: {done.answer['errors']}")
    values = {
        "s": done.answer["seconds"]["job"],
        "peak_bytes": done.peak_bytes,
        "bare_bytes": bare.peak_bytes,
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "packed_bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
    }
    shutil.rmtree(out)
    print({name: round(v / GIBIBYTE, 3) if name.endswith("bytes") else v for name, v in values.items()})
    settings = {**shape, **data, "method": options.method, "scheme": options.scheme, "load_before": load}
    path = append_record(
        "large",
        values,
        subject=f"{options.method} {options.scheme}, random Llama {options.width} x {options.layers}",
        results=options.results,
        settings=settings,
        threads=options.threads,
        seed=options.seed,
        versions=done.answer["versions"],
        notes=(COUNTED,),
    )
    print(path)


if __name__ == "__main__":
    main()
