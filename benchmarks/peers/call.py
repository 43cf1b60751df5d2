"""What the side-by-side benchmarks share: the peer's python, the same tokens, processes that are watched."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from compresskit.data.spec import DataSpec
from compresskit.errors import Fault

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEER_JOBS = HERE / "llmcompressor_jobs.py"
VARIABLE = "LLMCOMPRESSOR_PYTHON"
LOOK_S, LIST_CHILDREN_EVERY = 0.05, 10


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--peer-python`` and ``--alone``."""
    parser.add_argument(
        "--peer-python",
        default=os.environ.get(VARIABLE, ""),
        help=f"python of llm-compressor's environment; default: {VARIABLE} of the environment",
    )
    parser.add_argument("--alone", action="store_true", help="leave llm-compressor out")


def peer_python(options: argparse.Namespace) -> str | None:
    """The peer's python; None with ``--alone``. Where there is none, say how to make one and exit with 2."""
    if options.alone:
        return None
    python = options.peer_python
    found = python and subprocess.run(
        [python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('llmcompressor') is None)"],
        capture_output=True,
        check=False,
    )
    if not found or found.returncode:
        cure = (
            "Make one (python benchmarks/peers/make_env.py llmcompressor DIR) and give --peer-python "
            f"DIR/bin/python or {VARIABLE}; or measure compresskit --alone."
        )
        got = f"{python} without it" if python else "none named"
        print(Fault("--peer-python", "a python that has llm-compressor", got, cure), file=sys.stderr)
        raise SystemExit(2)
    return str(python)


def calibration_data(text: str) -> DataSpec:
    """The text both sides calibrate on; whole rows, as the peer reads them, with no end between documents."""
    return DataSpec(source=text, validation_fraction=0.0, cross_documents=True)


def save_ids(model: Path, text: str, *, rows: int, context_length: int, place: Path) -> Path:
    """Write the token ids of the rows that compresskit will calibrate on, for the peer.

    Returns:
        ``place/ids.safetensors`` with ``input_ids``, int32 (rows, context_length).
    """
    import torch
    from safetensors.torch import save_file

    from compresskit.data.pack import packed
    from compresskit.modeling import load_tokenizer, open_model

    found = packed(
        calibration_data(text),
        load_tokenizer(open_model(model)),
        context_length=context_length,
        cache=place / "tokens",
        rows=rows,
    )
    if len(found) < rows or found.context_length != context_length:
        got = f"{len(found)} rows of {found.context_length}"
        print(Fault(text, f"{rows} rows of {context_length} tokens", got, "Ask for less."), file=sys.stderr)
        raise SystemExit(2)
    path = place / "ids.safetensors"
    ids = torch.stack([found[i]["input_ids"] for i in range(rows)])
    save_file({"input_ids": ids.to(torch.int32)}, path)
    return path


def config_groups(scheme: Any, targets: Sequence[str] = ("Linear",)) -> dict[str, Any]:
    """A :class:`compresskit.quant.scheme.Scheme` in the words of compressed-tensors.

    The arguments are those of llm-compressor's own presets (W8A8, W4A16, FP8_DYNAMIC ...), with our group.
    """
    kind = {"num_bits": scheme.weight_bits, "type": scheme.number, "symmetric": scheme.symmetric}
    grouping = {"strategy": "channel"} if scheme.group_size is None else {"strategy": "group"}
    weights = {**kind, **grouping, "group_size": scheme.group_size, "dynamic": False}
    inputs = None
    if scheme.activation_bits is not None:
        strategy = "tensor" if scheme.static else "token"
        inputs = {**kind, "num_bits": 8, "strategy": strategy, "dynamic": not scheme.static}
    return {"group_0": {"targets": list(targets), "weights": weights, "input_activations": inputs}}


def sparsity_fields(pattern: str) -> dict[str, Any]:
    """A pattern of :func:`compresskit.sparse.pattern.parse_pattern` in the words of llm-compressor."""
    from compresskit.sparse.pattern import NM, parse_pattern

    found = parse_pattern(pattern)
    # There it is N of M that are zeroed.
    structure = f"{found.of - found.keep}:{found.of}" if isinstance(found, NM) else "0:0"
    return {"sparsity": found.zero_fraction, "mask_structure": structure}


@dataclass(frozen=True, slots=True)
class Watched:
    """What a process did.

    Attributes:
        answer: what it wrote.
        process_s: from its start to its end, imports included.
        cpu_s: of all cores and children; what other programs do to it is less than to the time that passes.
        peak_bytes: most resident memory; of its children the most at once comes on top.
    """

    answer: Mapping[str, Any]
    process_s: float
    cpu_s: float
    peak_bytes: int


def run_jobs(command: Sequence[str], task: Mapping[str, Any], place: Path) -> Watched:
    """Run a file of jobs in a fresh process and watch it.

    Args:
        command: without the file.
        task: of the file; ``answer`` is added.
        place: for the file, the answer and the log.

    Returns:
        The answer and the cost. A process that fails ends this one, with the last of its log.
    """
    jobs, answer, log = place / "jobs.json", place / "answer.json", place / "log.txt"
    jobs.write_text(json.dumps({**task, "answer": str(answer)}))
    answer.unlink(missing_ok=True)
    pinned = {name: str(task["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    began, cpu = time.perf_counter(), _cpu_of_children()
    # Tokens kept from an earlier run would spare this one the work.
    with log.open("w") as file, tempfile.TemporaryDirectory(dir=place) as cache:
        environment = {**os.environ, **pinned, "COMPRESSKIT_CACHE": cache}
        process = subprocess.Popen([*command, str(jobs)], cwd=ROOT, env=environment, stdout=file, stderr=file)
        peak = _watch(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Watched(json.loads(answer.read_text()), seconds, _cpu_of_children() - cpu, peak)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for ``process`` and return the peak of its memory, as the kernel counts it."""
    own = children = 0
    seen = psutil.Process(process.pid)
    for look in range(sys.maxsize):
        try:
            process.wait(LOOK_S)
            break
        except subprocess.TimeoutExpired:
            own = max(own, _high_water(process.pid))
        if look % LIST_CHILDREN_EVERY == 0:  # to list them costs milliseconds
            children = max(children, sum(_resident(child) for child in seen.children(recursive=True)))
    return own + children


def _high_water(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * int(next((line.split()[1] for line in lines if line.startswith("VmHWM")), 0))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
