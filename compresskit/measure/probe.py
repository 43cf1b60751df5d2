"""What runs in a fresh process: load a model, run a prompt through it, decode; report time or memory.

Started by :func:`compresskit.measure.fresh.run_probe` as a module; a job in JSON comes in on standard input
and the answer goes to the file that the job names.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from compresskit.errors import CompressKitError
from compresskit.timing import Runner, sample

Json = Any


def probe_latency(job: Json) -> Json:
    """Samples of prefill and decode time, after ``warmup`` unrecorded rounds; the collector is off."""
    from compresskit.kernels.dispatch import passed_over
    from compresskit.measure.load import empty_model, load_model
    from compresskit.modeling.sparse_linear import choices_of

    directory, trust = Path(job["directory"]), job["trust_remote_code"]
    empty_model(directory, trust_remote_code=trust)  # imports the model's code, which is no part of loading
    begin = time.perf_counter()
    model = load_model(directory, device=job["device"], trust_remote_code=trust)
    load_ms = (time.perf_counter() - begin) * 1e3
    runner = _runner(model, job)
    (samples,) = sample([runner], warmup=job["warmup"], repetitions=job["repetitions"])
    choices = choices_of(model)
    return {
        "load_ms": load_ms,
        "prefill_ms": [s[0] for s in samples],
        "decode_ms": [s[1] for s in samples] if runner.causal else [],
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(getattr(model.config, "_attn_implementation", "unknown")),
        "notes": list(dict.fromkeys((*passed_over(), *(n for c in choices.values() for n in c.notes)))),
        "layouts": {name: str(choice) for name, choice in choices.items()},
    }


def probe_memory(job: Json) -> Json:
    """Peak resident bytes of load, prefill and decode, beside those of the imports alone."""
    import torch

    from compresskit.measure.load import empty_model, load_model

    directory = Path(job["directory"])
    empty = empty_model(directory, trust_remote_code=job["trust_remote_code"])
    quantization = getattr(empty.config, "quantization_config", None)
    if quantization is not None:
        import_module("compressed_tensors")
    del empty
    gc.collect()
    is_reset = _reset_peak()
    baseline = _resident_bytes()
    on_gpu = job["device"].startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = load_model(directory, device=job["device"], trust_remote_code=job["trust_remote_code"])
    loaded = _peak_bytes()
    _runner(model, job).once()
    return {
        "baseline_bytes": baseline,
        "load_peak_bytes": loaded,
        "peak_bytes": _peak_bytes(),
        "is_peak_of_load_and_run": is_reset,
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _runner(model: Any, job: Json) -> Runner:
    return Runner(
        model,
        causal=job["causal"],
        prompt_tokens=job["prompt_tokens"],
        decode_tokens=job["decode_tokens"],
        seed=job["seed"],
    )


def _status_bytes(key: str) -> int | None:
    """One line of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _resident_bytes() -> int:
    import psutil

    return _status_bytes("VmRSS") or int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    # Not getrusage on Linux: its peak survives exec, so a child reports its parent's.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> bool:
    """Start the kernel's peak anew at the present size, so that the imports' own peak does not count."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


PROBES: dict[str, Callable[[Json], Json]] = {"latency": probe_latency, "memory": probe_memory}


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        answer = {"answer": PROBES[job["probe"]](job)}
    except CompressKitError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    Path(job["out"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
