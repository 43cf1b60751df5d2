"""llm-compressor at the jobs of a file; runs in an environment of its own, with nothing of this project.

    PEER-PYTHON benchmarks/peers/llmcompressor_jobs.py JOBS.json

``JOBS.json``: ``{"model", "ids", "threads", "answer", "jobs": [{"name", "method", "fields", "out"}]}``;
``ids`` is a safetensors file with ``input_ids`` (rows, tokens), ``fields`` are the modifier's:
``config_groups`` of compressed-tensors, or ``sparsity`` and ``mask_structure``, and ``ignore``. Writes to
``answer`` the seconds of each job, or its error, and the versions.

Counted in a job's seconds: reading the model, calibration, compression, writing the checkpoint; not the
imports.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llmcompressor", "torch", "transformers", "compressed-tensors")
# Each as its own documentation shows it, with its default options.
RECIPES: dict[str, Any] = {
    "rtn": lambda **fields: [QuantizationModifier(**fields)],
    "gptq": lambda **fields: [GPTQModifier(**fields)],
    "awq": lambda **fields: [AWQModifier(), QuantizationModifier(**fields)],
    "smoothquant": lambda **fields: [SmoothQuantModifier(), QuantizationModifier(**fields)],
    "smoothquant-gptq": lambda **fields: [SmoothQuantModifier(), GPTQModifier(**fields)],
    "wanda": lambda **fields: [WandaPruningModifier(**fields)],
    "sparsegpt": lambda **fields: [SparseGPTModifier(**fields)],
}


def run_job(model_dir: str, job: dict[str, Any], ids: torch.Tensor) -> float:
    """Compress one model into ``job["out"]`` and return the seconds."""
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    data = {}
    if job["method"] != "rtn":
        data = {
            "dataset": Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": ids.shape[1],
            "shuffle_calibration_samples": False,
        }
    oneshot(model=model, tokenizer=tokenizer, recipe=RECIPES[job["method"]](**job["fields"]), **data)
    partial = Path(f"{job['out']}.partial")
    model.save_pretrained(partial, save_compressed="config_groups" in job["fields"])
    tokenizer.save_pretrained(partial)
    partial.rename(job["out"])
    return time.perf_counter() - began


def main() -> None:
    """Run every job; a job that fails is told in the answer, and the next one is run."""
    task = json.loads(Path(sys.argv[1]).read_text())
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    if not torch.accelerator.is_available():
        # AWQ pins its cache for an accelerator, and ends with an error where there is none.
        IntermediatesCache.pin_memory = lambda *_, **__: None
    torch.set_num_threads(task["threads"])
    ids = load_file(task["ids"])["input_ids"]
    seconds, errors = {}, {}
    for job in task["jobs"]:
        try:
            seconds[job["name"]] = run_job(task["model"], job, ids)
        except Exception as error:
            errors[job["name"]] = f"{type(error).__name__}: {error}"
    answer = {
        "seconds": seconds,
        "errors": errors,
        "versions": {name: version(name) for name in PACKAGES},
    }
    Path(task["answer"]).write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
