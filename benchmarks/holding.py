"""What holding zeros costs a training step.

    python -m benchmarks.holding --rows 2 --context-length 512 --steps 6

A random Llama of 110 million parameters, 80% of whose linear weights are zero, takes one AdamW step with the
zeros held and one without, in turn, so that whatever else the machine does falls on both. Seconds are of the
processor, which other programs take less from than from those of the clock; the overhead is the median over
pairs of steps. Also told: a change of all zeros by magnitude, as gradual pruning makes one every ten steps.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.run import append_record
from compresskit.sparse.train_run import Scheduled
from compresskit.timing import default_threads
from compresskit.training.access import Whole
from compresskit.training.hold import hold_zeros
from compresskit.training.zeroing import change_zeros

VOCABULARY = 32_000
PATTERN = "80%:layer"


def make_model(width: int, layers: int) -> Any:
    """The model, in training."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=-(-width * 8 // 3 // 128) * 128,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def step_seconds(model: Any, optimizer: Any, ids_BT: torch.Tensor) -> float:
    """One forward pass, one backward pass, one step."""
    began = time.process_time()
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - began


def main() -> None:
    """Run it and append a record."""
    parser = argparse.ArgumentParser(description="The cost of holding zeros.")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(default_threads())
    model, access = make_model(options.width, options.layers), Whole()
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    zeroing = Scheduled(method="gradual", ends=dict.fromkeys(names, PATTERN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids_BT = torch.randint(0, VOCABULARY, (options.rows, options.context_length))

    step_seconds(model, optimizer, ids_BT)
    began = time.process_time()
    change_zeros(model, zeroing, access, optimizer, 1, 1)
    change_s = time.process_time() - began
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * options.steps):
        held = turn % 2 == 0
        with hold_zeros(model, names, access) if held else nullcontext():
            seconds[held].append(step_seconds(model, optimizer, ids_BT))
    held_s, plain_s = median(seconds[True]), median(seconds[False])
    overhead = median(held / plain - 1 for held, plain in zip(seconds[True], seconds[False], strict=True))
    values = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_held_s": held_s,
        "step_plain_s": plain_s,
        "overhead_of_holding": overhead,
        "change_s": change_s,
        "overhead_with_a_change_every_10_steps": overhead + change_s / 10 / plain_s,
        "seconds": {"held": seconds[True], "plain": seconds[False]},
    }
    print(json.dumps(values, indent=1))
    print(append_record("holding", values, subject=json.dumps(vars(options)), repetitions=options.steps))


if __name__ == "__main__":
    main()
