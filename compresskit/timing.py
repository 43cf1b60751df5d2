"""What is timed, by whoever times it: one request to a model, and on what. No torch until a model is there.

A request is a prompt of one row, whose token ids are random, and, where the model predicts the next token,
further tokens given one by one with the key-value cache.
"""

from __future__ import annotations

import gc
import inspect
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from compresskit.errors import Fault, InputError

Json = Any

PROMPT_TOKENS = 128
DECODE_TOKENS = 32
WARMUP = 3
"""Requests before those that count."""
REPETITIONS = 10
"""Requests that count; their median is told."""


def default_threads() -> int:
    """``OMP_NUM_THREADS`` where it is set, else the number of cores this process may use."""
    if (chosen := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(chosen) > 0:
        return int(chosen)
    return usable_cores()


def usable_cores() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.MULTILINE)
        name = names[0] if names else name
    return f"{name}, {usable_cores()} cores"


def request_tokens(limit: int, prompt: int | None, decode: int | None) -> tuple[int, int]:
    """Lengths of the prompt and of what is decoded after it, in tokens.

    Args:
        limit: positions of the model.
        prompt: as asked for; None is :data:`PROMPT_TOKENS`, or what fits.
        decode: as asked for; None is :data:`DECODE_TOKENS`, or what fits.

    Returns:
        Both, at least 1 each.

    Raises:
        InputError: those asked for do not fit.
    """
    decode = min(DECODE_TOKENS, max(limit // 4, 1)) if decode is None else decode
    prompt = min(PROMPT_TOKENS, max(limit - decode, 1)) if prompt is None else prompt
    if prompt < 1 or decode < 1 or prompt + decode > limit:
        expected = f"at least 1 each and at most {limit} together, the model's positions"
        got, cure = f"{prompt} and {decode}", "Choose shorter ones."
        raise InputError(Fault("prompt_tokens and decode_tokens", expected, got, cure))
    return prompt, decode


def load_average() -> float:
    """Processes that wanted a core over the last minute, on average; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def is_crowded(load: float) -> bool:
    """Whether ``load`` is more than the cores of this machine can do, so that times are too long."""
    return load > (os.cpu_count() or 1) + 0.5


class Runner:
    """A loaded model and a fixed prompt; one call of :meth:`once` is one prefill and its decode steps.

    Args:
        model: in evaluation mode, on its device.
        causal: whether to decode at all.
        prompt_tokens: length of the prompt, one row.
        decode_tokens: tokens decoded one by one after it, with the key-value cache.
        seed: of the prompt's random token ids.
    """

    def __init__(
        self, model: Any, *, causal: bool, prompt_tokens: int, decode_tokens: int, seed: int
    ) -> None:
        import torch

        self.torch, self.model, self.causal = torch, model, causal
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(
            vocabulary, (1, prompt_tokens + decode_tokens), generator=torch.Generator().manual_seed(seed)
        )
        self.prompt_BT = ids[:, :prompt_tokens].to(model.device)
        self.steps = [ids[:, i : i + 1].to(model.device) for i in range(prompt_tokens, ids.shape[1])]
        # What generate() does: only the last position of the prompt goes through the head.
        accepts = inspect.signature(model.forward).parameters
        self.prefill_options: dict[str, Json] = {"use_cache": True} if causal else {}
        if causal and "logits_to_keep" in accepts:
            self.prefill_options["logits_to_keep"] = 1

    def once(self) -> tuple[float, float]:
        """Milliseconds of the prefill and of one decoded token (mean of all steps; 0 without decoding)."""
        with self.torch.inference_mode():
            begin = self._now()
            out = self.model(input_ids=self.prompt_BT, **self.prefill_options)
            middle = self._now()
            for step_B1 in self.steps if self.causal else ():
                out = self.model(input_ids=step_B1, past_key_values=out.past_key_values, use_cache=True)
            end = self._now()
        decode_ms = (end - middle) * 1e3 / len(self.steps) if self.causal and self.steps else 0.0
        return (middle - begin) * 1e3, decode_ms

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


def sample(
    runners: Sequence[Runner],
    *,
    warmup: int,
    repetitions: int,
    least: int = 1,
    budget_s: float = inf,
) -> list[list[tuple[float, float]]]:
    """Time requests to one model after the other, in turn, the garbage collector off.

    Args:
        runners: of the models.
        warmup: requests to each that do not count.
        repetitions: requests to each that do.
        least: of these, however long they take.
        budget_s: seconds after which no further ones begin.

    Returns:
        For each model what :meth:`Runner.once` gave.
    """
    for _ in range(warmup):
        for runner in runners:
            runner.once()
    found: list[list[tuple[float, float]]] = [[] for _ in runners]
    collects, began = gc.isenabled(), time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repetitions):
            if turn >= least and time.perf_counter() - began > budget_s:
                break
            for runner, samples in zip(runners, found, strict=True):
                samples.append(runner.once())
    finally:
        if collects:
            gc.enable()
    return found
