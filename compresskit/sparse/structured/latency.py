"""What a request to a model of some shape takes on this machine, found with random weights.

What is timed is what ``compresskit.measure`` times: :mod:`compresskit.timing` says what a request is. A model
is timed whole, in its own class, so that what its layers cost besides multiplying counts too, and so does
what the processor's caches hold. Blocks of more than :data:`LARGE_BYTES` are more than any cache holds: of
such a model two shallower ones are timed, one half as deep as the other, and further blocks cost what theirs
do.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

from compresskit.errors import Fault, OutputError
from compresskit.home import cache_home
from compresskit.modeling.anatomy import Anatomy
from compresskit.modeling.skeleton import model_class
from compresskit.progress import Progress
from compresskit.sparse.structured.resize import resized
from compresskit.sparse.structured.surgery import Patient, spaced
from compresskit.timing import (
    REPETITIONS,
    WARMUP,
    Runner,
    default_threads,
    is_crowded,
    load_average,
    processor,
    sample,
)

LARGE_BYTES = 1 << 30
LEAST_REPETITIONS = 3
BUDGET_S = 10.0
"""Of requests that count, to the models of one shape; :data:`LEAST_REPETITIONS` are always made."""
SEED = 0
NO_SHAPE = ("_name_or_path", "transformers_version")
"""Of a configuration: what says nothing of the model's shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Medians over requests to one model.

    Attributes:
        prefill_ms: of the prompt.
        decode_ms: of one token after it; 0 where the model does not predict the next token.
        decode_tokens: of a request; 0 likewise.
        load_average: of the machine while they were timed.
    """

    prefill_ms: float
    decode_ms: float
    decode_tokens: int
    load_average: float = 0.0

    @property
    def request_ms(self) -> float:
        """Of a whole request."""
        return self.prefill_ms + self.decode_tokens * self.decode_ms

    def to_json(self) -> dict[str, float]:
        """For the result of a stage."""
        return {
            "prefill_ms": self.prefill_ms,
            "decode_ms": self.decode_ms,
            "decode_tokens": self.decode_tokens,
            "request_ms": self.request_ms,
        }

    def __str__(self) -> str:
        if not self.decode_tokens:
            return f"{self.request_ms:.4g} ms"
        return f"{self.request_ms:.4g} ms ({self.prefill_ms:.4g} ms, then {self.decode_ms:.4g} ms a token)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopwatch:
    """Times requests to models of any configuration; each is timed once, and its time kept on disk.

    Kept times are what makes a plan and its run choose alike; another processor, number of threads or version
    of torch or transformers has its own.

    Attributes:
        prompt_tokens: of a request.
        decode_tokens: of a request.
        dtype: of the weights.
        device: ``cpu`` or ``cuda``.
        threads: of one operation.
        cache: folder of the times.
    """

    prompt_tokens: int
    decode_tokens: int
    dtype: torch.dtype
    device: str
    threads: int
    cache: Path

    def __call__(self, patient: Patient) -> Latency:
        """The time of a request to a model of ``patient``'s configuration.

        Raises:
            ModelError: no key of the configuration sets the number of blocks.
            OutputError: the folder of the times cannot be written.
        """
        path = self.cache / f"{self._key(patient.config)}.json"
        if path.is_file():
            try:
                return Latency(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                warnings.warn(f"{path} is damaged ({error}); the model is timed again.", stacklevel=2)
        found = self.time(patient)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            part.write_text(json.dumps(asdict(found)), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            cure = "Make room, or set COMPRESSKIT_CACHE to another folder."
            raise OutputError(Fault(str(self.cache), "a folder to write to", str(error), cure)) from error
        return found

    def time(self, patient: Patient) -> Latency:
        """Time requests now.

        Args:
            patient: its configuration and its code are what counts; no weight is read.

        Returns:
            The time for all of its blocks.

        Raises:
            ModelError: no key of the configuration sets the number of blocks.
        """
        total, load = len(patient.anatomy.blocks), load_average()
        depths = timed_depths(patient.anatomy, self.dtype.itemsize)
        with pinned(self.threads), Progress("timing", 1, unit="shapes") as progress:
            runners = [self._runner(patient, blocks) for blocks in depths]
            taken = sample(
                runners,
                warmup=WARMUP,
                repetitions=REPETITIONS,
                least=LEAST_REPETITIONS,
                budget_s=BUDGET_S,
            )
            progress.advance(note=f"{patient.anatomy.num_parameters:,} parameters")
        prefill_ms, decode_ms = (
            at_depth(total, depths, [median(request[part] for request in samples) for samples in taken])
            for part in range(2)
        )
        return Latency(
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            decode_tokens=self.decode_tokens if patient.anatomy.is_causal else 0,
            load_average=max(load, load_average()),
        )

    def notes(self, after: Latency, before: Latency) -> tuple[str, ...]:
        """What to tell of the times of a smaller model and of the model before it."""
        request = f"A prompt of {self.prompt_tokens} tokens"
        if after.decode_tokens:
            request += f" and {after.decode_tokens} tokens after it"
        how = f"timed on {self.device} with random weights in {str(self.dtype).removeprefix('torch.')}"
        if self.device == "cpu":
            how += f" and {self.threads} thread{'s' if self.threads > 1 else ''}"
        notes = [f"{request} are forecast to take {after} instead of {before}; {how}."]
        if self.device == "cpu" and is_crowded(max(after.load_average, before.load_average)):
            crowd = f"The machine had more work than its {os.cpu_count()} cores while that was timed"
            notes.append(f"{crowd}: delete {self.cache} to time again.")
        return tuple(notes)

    def _runner(self, patient: Patient, blocks: int) -> Runner:
        """Requests to a model of ``patient``'s configuration with so many blocks."""
        config, total = patient.config, len(patient.anatomy.blocks)
        if blocks < total:
            config = resized(config, patient.with_blocks(spaced(total, blocks)))
        return Runner(
            random_model(config, patient, self.dtype, self.device),
            causal=patient.anatomy.is_causal,
            prompt_tokens=self.prompt_tokens,
            decode_tokens=self.decode_tokens,
            seed=SEED,
        )

    def _key(self, config: Any) -> str:
        data = {k: v for k, v in config.to_dict().items() if k not in NO_SHAPE}
        where = torch.cuda.get_device_name() if self.device == "cuda" else processor()
        versions = [torch.__version__, transformers.__version__]
        facts = [data, where, self.threads, str(self.dtype), self.prompt_tokens, self.decode_tokens, versions]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def stopwatch_for(
    config: Any, weight_bytes: float, device: str, prompt_tokens: int, decode_tokens: int
) -> Stopwatch:
    """The stopwatch for a model as users load it, with as many threads as ``compresskit.measure`` takes.

    Args:
        config: of the model.
        weight_bytes: of one stored parameter, for a configuration that does not tell the dtype.
        device: ``cpu`` or ``cuda``.
        prompt_tokens: of a request.
        decode_tokens: of a request.
    """
    stored = torch.float32 if weight_bytes > 2 else torch.bfloat16
    home = cache_home()
    return Stopwatch(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        dtype=config.dtype or stored,
        device=device,
        threads=default_threads(),
        cache=home / "latency",
    )


def timed_depths(anatomy: Anatomy, weight_bytes: float) -> tuple[int, ...]:
    """Numbers of blocks to time: all of them, or two smaller numbers where these are large enough."""
    total = len(anatomy.blocks)
    inside = sum(
        prod(s) for name, s in anatomy.parameter_shapes.items() if anatomy.block_of(name) is not None
    )
    block_bytes = inside * weight_bytes / max(total, 1)
    enough = max(2, -int(-LARGE_BYTES // max(block_bytes, 1)))
    return (total,) if total <= enough else (enough // 2, enough)


def at_depth(total: int, depths: Sequence[int], times_ms: Sequence[float]) -> float:
    """The time for ``total`` blocks, on the line through what was timed at ``depths``."""
    if len(depths) == 1:
        return times_ms[0]
    (near, far), (near_ms, far_ms) = depths, times_ms
    return far_ms + (total - far) * (far_ms - near_ms) / (far - near)


def random_model(config: Any, patient: Patient, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of ``config`` with random weights, in evaluation mode on ``device``.

    As in a loaded model, weights may need gradients: torch multiplies otherwise where they do not.
    """
    cls: Any = model_class(config, patient.directory, trust_remote_code=patient.trust_remote_code)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(SEED)
        model: nn.Module = cls._from_config(deepcopy(config), dtype=dtype)
    return model.eval()


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Let torch use so many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
