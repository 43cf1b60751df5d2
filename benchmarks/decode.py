"""Tokens a second and memory of ``generate`` at batch 1: a random Llama, dense and with zeros.

    python -m benchmarks.run decode
    python -m benchmarks.run decode --hidden 64 --intermediate 128 --layers 2 --tokens 4

Each model is written as a bitmask directory. Each cell, a model with dense weights kept beside packed ones or
without, runs in a process of its own, several times in turn with the others, so that a machine whose load
drifts drifts for all of them. Tokens of the prompt are not counted. Pages of files are counted apart: a dense
model is read from a map of its file, page by page as it is needed, and they are dropped when memory is short.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.run import RESULTS, append_record
from compresskit.measure.record import spread

KINDS = ("dense", "2:4", "50%", "60%", "70%")
VOCABULARY = 32000
PROMPT = 16
RESIDENT = ("fastest", "packed")
KEPT = ("load_s", "cuda_loaded", "choices", "kernels", "passed_over")
MEMORY = ("VmHWM", "RssAnon", "RssFile")


def make(kind: str, place: Path, given: argparse.Namespace) -> None:
    """Write the model: random weights, of each linear layer in a block the pattern's share zero."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import compresskit as ck

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=given.hidden,
        intermediate_size=given.intermediate,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.hidden // 64),
        num_key_value_heads=max(1, given.hidden // 64),
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear) and kind != "dense":
                module.weight.data.mul_(_kept(kind, module.weight))
    plain = place / "plain"
    model.save_pretrained(plain if kind != "dense" else place / "model")
    if kind != "dense":
        ck.export(plain, to="bitmask", out=place / "model")


def _kept(kind: str, weight: Any) -> Any:
    import torch

    if kind == "2:4":
        keep = torch.zeros(weight.shape[0], weight.shape[1] // 4, 4, dtype=torch.bool)
        order = torch.rand(keep.shape).argsort(-1)
        return keep.scatter_(-1, order[..., :2], value=True).view(weight.shape)
    return torch.rand(weight.shape) >= float(kind.rstrip("%")) / 100


def run(directory: Path, given: argparse.Namespace, resident: str) -> dict[str, Any]:
    """Generate, and say how fast and with how much memory."""
    import torch

    import compresskit as ck
    from compresskit.kernels.choice import table
    from compresskit.kernels.dispatch import passed_over, used
    from compresskit.modeling.sparse_linear import choices_of

    on_gpu = given.device != "cpu"
    imported = memory()
    began = time.perf_counter()
    model: Any = ck.load(directory, device=given.device, resident=resident)
    load_s = time.perf_counter() - began
    loaded, cuda_loaded = memory(), _cuda_bytes(on_gpu)
    prompt = torch.arange(1, PROMPT + 1, device=model.device)[None]

    def seconds(tokens: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    first = min(seconds(1) for _ in range(2))
    rates = [(given.tokens - 1) / max(1e-9, seconds(given.tokens) - first) for _ in range(given.repetitions)]
    ended = memory()
    return {
        "tokens_per_s": rates,
        "prompt_ms": first * 1e3,
        "imported_bytes": imported["RssAnon"] + imported["RssFile"],
        "load_peak_bytes": loaded["VmHWM"],
        "loaded_anonymous_bytes": loaded["RssAnon"],
        "loaded_file_bytes": loaded["RssFile"],
        "peak_bytes": ended["VmHWM"],
        "anonymous_bytes": ended["RssAnon"],
        "file_bytes": ended["RssFile"],
        "cuda_loaded": cuda_loaded,
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "disk_bytes": sum(p.stat().st_size for p in directory.glob("*.safetensors")),
        "load_s": load_s,
        "parameters": model.num_parameters(),
        "tensor_bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "choices": table(choices_of(model)),
        "kernels": used(),
        "passed_over": list(passed_over()),
    }


def memory() -> dict[str, int]:
    """Bytes of this process alone: its peak, and what is resident now, of no file and of files.

    Not getrusage: what it says survives exec.
    """
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    said = dict(line.split(":", 1) for line in lines)
    return {name: int(said[name].split()[0]) * 1024 for name in MEMORY}


def _cuda_bytes(on_gpu: bool) -> dict[str, int] | None:
    """While loading, at the peak, and after it."""
    import torch

    if not on_gpu:
        return None
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "bytes": torch.cuda.memory_allocated()}


def main() -> None:
    """Make the models, run each in turn, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resident", nargs="+", default=RESIDENT, choices=RESIDENT)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, metavar=("VERB", "WHAT", "DIR", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        verb, what, place, out = *given.one[:2], *map(Path, given.one[2:])
        answer = run(place, given, what.strip("-")) if verb == "run" else make(what, place, given)
        out.write_text(json.dumps(answer))
        return
    cells = cells_of(given.kinds, given.resident)
    found: dict[str, list[dict[str, Any]]] = {cell: [] for cell in cells}
    with tempfile.TemporaryDirectory() as scratch:
        for index, kind in enumerate(given.kinds):
            _alone("make", kind, Path(scratch) / str(index))
        for _ in range(given.rounds):
            for cell, (index, resident) in cells.items():
                found[cell].append(_alone("run", resident or "-", Path(scratch) / str(index) / "model"))
    values, quartiles = summed_up(found)
    settings = {name: value for name, value in vars(given).items() if name not in ("results", "one")}
    subject = f"a random Llama of {next(iter(found.values()))[0]['parameters'] / 1e9:.2f}B parameters"
    print(
        append_record(
            "decode",
            values,
            subject=subject,
            results=given.results,
            quartiles=quartiles,
            settings=settings,
            device=given.device,
            repetitions=given.rounds * given.repetitions,
        )
    )


def cells_of(kinds: Sequence[str], residents: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Name of a cell -> which of ``kinds``, and what is kept in memory; a dense model is loaded as it is."""
    return {
        f"{kind} {resident}".strip(): (index, resident)
        for index, kind in enumerate(kinds)
        for resident in (residents if kind != "dense" else ("",))
    }


def summed_up(found: Mapping[str, list[dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and quartiles of the record: rates over all rounds, and what they are of the first cell's.

    Of memory and of the time of the prompt it is the worst round.
    """
    values: dict[str, Any] = {}
    quartiles: dict[str, Any] = {}
    worst = ("prompt_ms", *(name for name in next(iter(found.values()))[0] if name.endswith("_bytes")))
    for cell, answers in found.items():
        name = f"{cell}_tokens_per_s"
        quartiles[name] = spread([rate for answer in answers for rate in answer["tokens_per_s"]])
        values[name] = quartiles[name][1]
        base = values[next(iter(values))]
        values[cell] = {
            "speedup": values[name] / base,
            **{one: max((a[one] for a in answers if a[one] is not None), default=None) for one in worst},
            **{one: answers[-1][one] for one in KEPT},
        }
        print(told(cell, values[name], values[cell]), flush=True)
    return values, quartiles


def told(cell: str, rate: float, values: Mapping[str, Any]) -> str:
    """A line of what is printed."""
    gb = {
        name: value / 1e9 for name, value in values.items() if name.endswith("_bytes") and value is not None
    }
    return (
        f"{cell:<12} {rate:8.2f} tokens/s  {values['speedup']:5.2f}x  prompt {values['prompt_ms']:7.1f} ms  "
        f"GB: {gb['load_peak_bytes']:.2f} at most while loading, then {gb['loaded_anonymous_bytes']:.2f} and "
        f"{gb['loaded_file_bytes']:.2f} of files; {gb['peak_bytes']:.2f} at most in all, at the end "
        f"{gb['anonymous_bytes']:.2f} and {gb['file_bytes']:.2f}"
    )


def _alone(verb: str, what: str, place: Path) -> Any:
    """Do it in a process of its own."""
    out = place.parent / f"{place.name}.json"
    if verb == "make":
        place.mkdir()
    words = [*sys.argv[1:], "--one", verb, what, str(place), str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.decode", *words], check=True, env=dict(os.environ))
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
