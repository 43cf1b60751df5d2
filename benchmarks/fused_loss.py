"""The fused distillation loss beside the plain one on whole logits: time and memory at large vocabularies.

    python -m benchmarks.run fused_loss
    python -m benchmarks.run fused_loss --device cuda --tokens 4096 --dtype bfloat16

Forward KL from hidden states, forward and backward, with the gradients of the student's hidden states and
output projection. Each cell in a process of its own; on a CPU ``peak_bytes`` is what the kernel's high-water
mark rose by after the inputs were made and one small call had been, on a GPU what torch allocated at most
besides. Both sides' losses are kept: they are to agree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from benchmarks.run import RESULTS, append_record
from compresskit.distill.divergences import Divergences
from compresskit.measure.record import spread
from compresskit.timing import default_threads
from compresskit.training.objective import Head, Hidden, Signal

FUSED, PLAIN = "fused", "plain"
VOCABULARIES = (32_000, 128_000, 256_000)


def fused(hidden_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, head_VE: Tensor) -> Tensor:
    """As a distil stage computes it; the last row is there to be predicted."""
    labels = torch.zeros(1, hidden_ND.shape[0] + 1, dtype=torch.int64, device=hidden_ND.device)
    says = Hidden(_with_last(teacher_NE), Head(head_VE))
    return Divergences()(_with_last(hidden_ND), Head(head_VD), labels, Signal(says))["loss"]


def _with_last(hidden_ND: Tensor) -> Tensor:
    return torch.cat([hidden_ND, hidden_ND[:1]])[None]


def plain(hidden_ND: Tensor, head_VD: Tensor, teacher_NE: Tensor, head_VE: Tensor) -> Tensor:
    """As one writes it by hand."""
    with torch.no_grad():
        log_p = log_softmax((teacher_NE @ head_VE.T).float(), -1)
    log_q = log_softmax((hidden_ND @ head_VD.T).float(), -1)
    return kl_div(log_q, log_p, log_target=True, reduction="sum")


def child(job: dict[str, Any]) -> None:
    """Time one side and print what it came to as JSON on the last line."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    like = {"device": job["device"], "dtype": getattr(torch, job["dtype"])}
    tokens, vocabulary = job["tokens"], job["vocabulary"]
    student = [torch.randn(n, job["width"], **like).requires_grad_() for n in (tokens, vocabulary)]
    teacher = [torch.randn(n, job["teacher_width"], **like) for n in (tokens, vocabulary)]
    with torch.no_grad():
        for head in (student[1], teacher[1]):
            head.mul_(0.05)
    side = {FUSED: fused, PLAIN: plain}[job["side"]]

    def once(tokens: int) -> float:
        loss = side(student[0][:tokens], student[1], teacher[0][:tokens], teacher[1])
        loss.backward()
        for leaf in student:
            leaf.grad = None
        return float(loss)

    once(16)
    before = _peak_bytes(job["device"], reset=True)
    seconds, loss = [], 0.0
    for _ in range(job["repetitions"]):
        began = time.perf_counter()
        loss = once(tokens)  # which waits for the device
        seconds.append(time.perf_counter() - began)
    peak = _peak_bytes(job["device"]) - before
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "loss": loss}))


def _peak_bytes(device: str, *, reset: bool = False) -> int:
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew at what is resident
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def cell(job: dict[str, Any]) -> dict[str, Any]:
    """What a side came to in a fresh process, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="The fused distillation loss beside the plain one.")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--teacher-width", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run every cell, both sides in turn, and append a record."""
    options = parsed()
    if options.child:
        child(json.loads(options.child))
        return
    names = ("tokens", "width", "teacher_width", "dtype", "device", "repetitions")
    settings = {name: getattr(options, name) for name in names}
    values: dict[str, Any] = {}
    quartiles: dict[str, Any] = {}
    for vocabulary in options.vocabularies:
        job = {**settings, "vocabulary": vocabulary, "threads": default_threads()}
        sides = {side: cell({**job, "side": side}) for side in (FUSED, PLAIN)}
        for side, found in sides.items():
            if "seconds" in found:
                name = f"{side}_{vocabulary}_s"
                quartiles[name] = spread(found["seconds"])
                values[name] = quartiles[name][1]
        values[str(vocabulary)] = sides
        if all("seconds" in found for found in sides.values()):
            ours, theirs = sides[FUSED], sides[PLAIN]
            values[str(vocabulary)] |= {
                "time_ratio": median(ours["seconds"]) / median(theirs["seconds"]),
                "peak_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
                "loss_difference": abs(ours["loss"] / theirs["loss"] - 1),
            }
        print(vocabulary, json.dumps(values[str(vocabulary)]), flush=True)
    del settings["repetitions"]
    print(
        append_record(
            "fused-loss",
            values,
            subject="forward KL from hidden states, forward and backward",
            results=options.results,
            quartiles=quartiles,
            settings=settings,
            repetitions=options.repetitions,
        )
    )


if __name__ == "__main__":
    main()
